"""DSKD and matched latents against definitions in loops over tokens, values and gradients in float64.

The definitions share no code with the losses; their formulas are those of docs/losses.md.

Faults tried, each caught here: hidden states or embeddings of DSKD not divided, or by the sample's standard
deviation; scores over √E; a head's gradient from the alignment; divergence and cross entropy at each other's
positions; a chunk read at its first token; a scale over padding; the layer below.
"""

import dataclasses

import pytest
import torch

from tests.losses.example import make, make_batch, make_context, run_loss
from tests.losses.test_latents import with_layers
from tokenkit.losses import latents_loss
from tokenkit.losses.dskd import Projections


def scored(side, b):
    """Return the tokens of a document that have a log-probability and are trained."""
    return [i for i in range(1, int(side.length_B[b])) if side.trained_BT[b, i]]


def kl(z_teacher, z_student):
    log_q, log_p = z_teacher.log_softmax(-1), z_student.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum()


def dskd(batch, student, teacher, maps: Projections):
    """Return the three means, and every vector that the teacher is in the student's space, by token."""
    h, e, head = student.hidden_BTD, student.embedded_BTD.detach(), student.head.weight_VD
    g, f, teacher_head = (
        x.detach() for x in (teacher.hidden_BTD, teacher.embedded_BTD, teacher.head.weight_VD)
    )
    real = [(b, j) for b in range(len(g)) for j in range(1, int(batch.teacher.length_B[b]))]
    key_std = torch.stack([torch.cat([f[b, j - 1], f[b, j]]) for b, j in real]).std(correction=0)
    hidden_std = torch.stack([g[b, j - 1] for b, j in real]).std(correction=0)
    next_std = torch.stack([f[b, j] for b, j in real]).std(correction=0)
    parts, mirrored = ([], [], []), {}
    for b in range(len(h)):
        tokens, others = scored(batch.student, b), scored(batch.teacher, b)
        query = torch.stack([maps.query(torch.cat([e[b, i - 1], e[b, i]])) for i in tokens])
        key = torch.stack([torch.cat([f[b, j - 1], f[b, j]]) / key_std for j in others])
        score = query @ key.T / (2 * f.shape[-1]) ** 0.5
        value = torch.stack([maps.t2s(g[b, j - 1] / hidden_std + f[b, j] / next_std) for j in others])
        for i, u in zip(tokens, score.softmax(1) @ value, strict=True):
            label, z = batch.student.ids_BT[b, i], u @ head.detach().T
            mirrored[b, i] = z.argmax()
            parts[0].append(-z.log_softmax(-1)[label])
            if z.argmax() == label:
                parts[1].append(kl(z.detach(), h[b, i - 1] @ head.T))
        value = torch.stack([maps.s2t(h[b, i - 1]) for i in tokens])
        for j, w in zip(others, score.softmax(0).T @ value, strict=True):
            parts[2].append(kl(g[b, j - 1] @ teacher_head.T, w @ teacher_head.T))
    return [torch.stack(part).mean() if part else h.sum() * 0 for part in parts], mirrored


def gradients(value, tensors):
    found = torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True)
    return [
        torch.zeros_like(x) if x_grad is None else x_grad for x, x_grad in zip(tensors, found, strict=True)
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_dskd_is_its_definition(seed):
    batch = make_batch()
    student, teacher = with_layers(batch)
    with torch.no_grad():
        torch.manual_seed(seed)
        for states in (student, teacher):
            states.hidden_BTD.normal_()
            states.embedded_BTD.normal_(3, 2)
            states.embedded_BTD[1, 7:] = 1e3  # padding
    context = make_context(make("baseline_dskd"), student, teacher)
    _, mirrored = dskd(batch, student, teacher, context.modules)
    ids = batch.student.ids_BT.clone()
    for (b, i), label in mirrored.items():
        ids[b, i] = label if i % 2 else ids[b, i]  # half of the tokens are what the mirrored teacher says
    batch = dataclasses.replace(batch, student=dataclasses.replace(batch.student, ids_BT=ids))
    means, _ = dskd(batch, student, teacher, context.modules)
    (total, count), context = run_loss("baseline_dskd", batch, student, teacher, causal=False)
    assert count[1] > 3
    torch.testing.assert_close(total / count / 3, torch.stack(means), rtol=1e-9, atol=0)
    trained = [student.hidden_BTD, student.head.weight_VD, *context.modules.parameters()]
    trained += [teacher.hidden_BTD, teacher.head.weight_VD, student.embedded_BTD, teacher.embedded_BTD]
    expected = gradients(dskd(batch, student, teacher, context.modules)[0], trained)
    for got, truth in zip(gradients((total / count).mean(), trained), expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-8, atol=1e-11)


def latents(batch, pairs, power, channelwise):
    """Return the mean over layers and chunks; `pairs` are both models' latents that face each other."""
    chunks, rows = batch.chunks["unconstrained"], []
    for b in range(len(chunks.student_BT)):
        sides = (chunks.student_BT[b], batch.student), (chunks.teacher_BS[b], batch.teacher)
        for chunk in range(int(chunks.student_BT[b].max()) + 1):
            ends = [[i for i, c in enumerate(x.tolist()) if c == chunk] for x, _ in sides]
            if all(ends) and all(s.trained_BT[b, x[-1]] for x, (_, s) in zip(ends, sides, strict=True)):
                rows.append((b, ends[0][-1], ends[1][-1]))
    layers = []
    for own, other in pairs:
        size = torch.stack([other[b, j] for b, _, j in rows]).detach().abs() ** power
        n = size.mean(0) if channelwise else size.mean()
        gaps = [((own[b, i] - other[b, j].detach()).abs() ** power / n).mean() for b, i, j in rows]
        layers.append(torch.stack(gaps).mean())
    return torch.stack(layers).mean(), len(rows)


@pytest.mark.parametrize("normalization", ["l1", "l2", "l1_channelwise", "l2_channelwise"])
@pytest.mark.parametrize("align", ["last_hidden_state", "all_hidden_states", "qkv"])
def test_latents_are_their_definition(align, normalization):
    batch = make_batch()
    student, teacher = with_layers(batch)  # 2 layers and 4
    pairs = {
        "last_hidden_state": [(student.hidden_BTD, teacher.hidden_BTD)],
        "all_hidden_states": [
            (student.layers_BTD[0], teacher.layers_BTD[1]),
            (student.layers_BTD[1], teacher.layers_BTD[3]),
        ],
        "qkv": [(student.qkv[i][k], teacher.qkv[2 * i + 1][k]) for i in range(2) for k in range(3)],
    }[align]
    truth, number = latents(batch, pairs, int(normalization[1]), "channelwise" in normalization)
    total, count = latents_loss(student, teacher, batch, align=align, normalization=normalization)
    assert count == number > 4
    torch.testing.assert_close(total / count, truth, rtol=1e-9, atol=0)
    trained = [x for pair in pairs for x in pair]
    for got, expected in zip(gradients(total / count, trained), gradients(truth, trained), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
