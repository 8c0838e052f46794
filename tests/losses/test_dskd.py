"""DSKD beyond the reference values: who attends to whom, what is counted, what is trained.

Faults tried, each caught here or by the reference values: std of padding too; embeddings shifted the
other way; the mask of the other direction; a chunk read at its first token; counts of all targets for the
divergence; a gradient into u from the divergence; totals not tripled; the teacher's temperature on the
student.
"""

import dataclasses

import pytest
import torch

from tests.losses.example import make, make_batch, make_context, make_states, run_loss
from tokenkit.losses import dskd as module
from tokenkit.losses import dskd_loss
from tokenkit.losses.dskd import Projections
from tokenkit.losses.dskd_masks import attention_masks
from tokenkit.structs import Batch, Chunks, Side, Widths


def test_nobody_attends_to_text_that_it_has_not_read():
    """Chunks: 0; 1, two student tokens and three of the teacher; 2, two and one; a teacher's in none; 3."""
    student, teacher = [[0, 1, 1, 2, 2, 3]], [[0, 1, 1, 1, 2, -1, 3]]
    sides = [
        Side(
            torch.zeros(1, len(x[0]), dtype=torch.long),
            torch.tensor([len(x[0])]),
            torch.ones(1, len(x[0])) > 0,
        )
        for x in (student, teacher)
    ]
    batch = Batch(*sides, {"unconstrained": Chunks(torch.tensor(student), torch.tensor(teacher))})
    masks = attention_masks(batch, causal=True)
    seen = [[j for j in range(6) if masks.to_teacher[0, i, j]] for i in range(5)]
    assert seen == [[0], [0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    seen = [[i for i in range(5) if masks.to_student[0, i, j]] for j in range(6)]
    assert seen == [[0], [0], [0], [0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_causality_holds_for_the_loss_of_a_position():
    """What a teacher says later cannot change the first part of the loss at an earlier student position."""
    batch = make_batch()
    student, teacher = make_states(batch)
    teacher.hidden_BTD.data.clamp_(-1, 1)
    loss = make("baseline_dskd")
    context = make_context(loss, student, teacher)
    prepared = loss.prepare(teacher, batch, context)
    score = module._scores(student.embedded_BTD, prepared.key_BSF, context.modules)
    before = module._into_student(score, prepared.value_BSE, prepared.masks, context.modules)
    changed = prepared.value_BSE.clone()
    changed[0, 5] += 10  # chunk 3, which the student has read at position 4
    after = module._into_student(score, changed, prepared.masks, context.modules)
    moved = (before != after).any(-1)[0].tolist()
    assert moved == [False, False, False, False, True, True, True]


def test_positions_with_nothing_to_attend_to_are_not_scored():
    batch = make_batch()
    chunks = dataclasses.replace(batch.chunks["unconstrained"])
    late = Chunks(chunks.student_BT.where(chunks.student_BT > 2, -1), chunks.teacher_BS)
    batch = dataclasses.replace(batch, chunks={"unconstrained": late})
    student, teacher = make_states(batch)
    (_, count), _ = run_loss("baseline_dskd", batch, student, teacher)
    (_, everywhere), _ = run_loss("baseline_dskd", batch, student, teacher, causal=False)
    assert count[0] < everywhere[0]
    assert everywhere[0] == 12


def half_right(batch, student, teacher):
    """Make the student's tokens those that the mirrored teacher predicts, in the first row."""
    loss = make("baseline_dskd")
    context = make_context(loss, student, teacher)
    prepared = loss.prepare(teacher, batch, context)
    with torch.no_grad():
        score = module._scores(student.embedded_BTD, prepared.key_BSF, context.modules)
        mirrored = module._into_student(score, prepared.value_BSE, prepared.masks, context.modules)
    ids = batch.student.ids_BT.clone()
    ids[0, 1:] = (mirrored @ student.head.weight_VD.T).argmax(-1)[0]
    return dataclasses.replace(batch, student=dataclasses.replace(batch.student, ids_BT=ids))


def test_the_divergence_counts_where_the_mirrored_teacher_is_right():
    batch = make_batch()
    student, teacher = make_states(batch)
    batch = half_right(batch, student, teacher)
    (total, count), context = run_loss("baseline_dskd", batch, student, teacher, causal=False)
    prepared = make("baseline_dskd", causal=False).prepare(teacher, batch, context)
    assert count.tolist() == [12, len(prepared.is_right_N), 14]
    with torch.no_grad():
        score = module._scores(student.embedded_BTD, prepared.key_BSF, context.modules)
        mirrored = module._into_student(score, prepared.value_BSE, prepared.masks, context.modules)
    said = (mirrored @ student.head.weight_VD.T).argmax(-1) == batch.student.ids_BT[:, 1:]
    scored = batch.student.trained_BT[:, 1:]
    assert count[1] == (said & scored).sum() > 0
    assert total.shape == (3,)


def test_embeddings_and_the_teacher_are_not_trained_by_the_alignment():
    batch = make_batch()
    student, teacher = make_states(batch)
    term, context = run_loss("baseline_dskd", batch, student, teacher)
    (term.total / term.count.clamp_min(1)).mean().backward()
    for tensor in (student.embedded_BTD, teacher.embedded_BTD, teacher.hidden_BTD, teacher.head.weight_VD):
        assert tensor.grad is None
    assert all(p.grad.any() for p in context.modules.parameters())


def test_cross_entropy_trains_no_head_and_the_divergence_no_projection():
    batch = make_batch()
    student, teacher = make_states(batch)
    term, context = run_loss("baseline_dskd", half_right(batch, student, teacher), student, teacher)
    parameters = dict(context.modules.named_parameters())
    tensors = [student.hidden_BTD, student.head.weight_VD, *parameters.values()]
    names = ["hidden", "head", *parameters]

    def trained(part):
        gradients = torch.autograd.grad(term.total[part], tensors, retain_graph=True, allow_unused=True)
        return {name for name, g in zip(names, gradients, strict=True) if g is not None and g.any()}

    query, t2s, s2t = ({f"{x}.weight", f"{x}.bias"} for x in ("query", "t2s", "s2t"))
    assert trained(0) == query | t2s
    assert trained(1) == {"hidden", "head"}
    assert trained(2) == query | s2t | {"hidden"}


def test_embeddings_that_do_not_vary_are_left_as_they_are():
    batch = make_batch()
    student, teacher = make_states(batch)
    teacher = dataclasses.replace(teacher, embedded_BTD=torch.zeros_like(teacher.embedded_BTD))
    term, _ = run_loss("baseline_dskd", batch, student, teacher)
    term.total.sum().backward()
    assert term.total.isfinite().all()
    assert student.hidden_BTD.grad.isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_scales_are_those_of_all_tokens_that_are_there(offset):
    """A step in two parts, the second one padded with what must not count; the definition is torch's own."""
    batch = make_batch()
    _, teacher = make_states(batch)
    with torch.no_grad():
        for state in (teacher.hidden_BTD, teacher.embedded_BTD):
            state += offset
            state[1, 7:] = torch.nan
    parts = []
    for row in range(2):
        states = dataclasses.replace(
            teacher, hidden_BTD=teacher.hidden_BTD[[row]], embedded_BTD=teacher.embedded_BTD[[row]]
        )
        side = batch.teacher
        side = dataclasses.replace(side, ids_BT=side.ids_BT[[row]], length_B=side.length_B[[row]])
        one = dataclasses.replace(batch, teacher=side)
        parts.append(make("baseline_dskd").measure(states, one))
    sums = parts[0].sum_K + parts[1].sum_K
    torch.testing.assert_close(make("baseline_dskd").measure(teacher, batch).sum_K, sums)
    divided = module._divided(teacher.hidden_BTD, teacher.embedded_BTD)
    for k, state in enumerate(divided):
        real = torch.cat([state[0], state[1, :6]])
        scaled = module._scaled(state, sums[3 * k : 3 * k + 3])
        torch.testing.assert_close(scaled[0], state[0] / real.std(correction=0), rtol=1e-9, atol=0)


def test_what_is_missing_is_named():
    batch = make_batch()
    student, teacher = make_states(batch)
    bare = dataclasses.replace(student, embedded_BTD=None)
    projections = Projections(Widths(6, 6, 1), Widths(6, 6, 1)).double()
    with pytest.raises(ValueError, match="needs the input embeddings of both models"):
        dskd_loss(bare, teacher, batch, projections)
    with pytest.raises(ValueError, match="needs its projections"):
        dskd_loss(student, teacher, batch, None)
    with pytest.raises(ValueError, match="widths must be equal, got 4 and 6"):
        Projections(Widths(6, 6, 1), Widths(6, 4, 1))
    with pytest.raises(ValueError, match="no 'unconstrained' chunks"):
        dskd_loss(student, teacher, dataclasses.replace(batch, chunks={}), projections)
    assert make("baseline_dskd").options.causal
