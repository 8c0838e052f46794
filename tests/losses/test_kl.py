"""`kl` against its definition in float64, and what is no business of it."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from tests.losses.example import make_batch, make_states
from tokenkit.kernels.kinds import DIVERGENCES
from tokenkit.losses import kl_loss, make_loss
from tokenkit.structs import Context, Head, HiddenStates


def one_tokenizer(**changes):
    """Return a batch whose teacher's side is cut two tokens later, and differs in row 1 from token 3 on."""
    batch = make_batch()
    T = batch.student.ids_BT.shape[1]
    ids = torch.nn.functional.pad(batch.student.ids_BT, (0, 2), value=7)
    ids[1, 3] = (ids[1, 3] + 1) % 40
    teacher = dataclasses.replace(
        batch.student, ids_BT=ids, length_B=torch.tensor([T + 2, 6]), trained_BT=torch.ones_like(ids).bool(),
        **changes,
    )  # fmt: skip
    return dataclasses.replace(batch, teacher=teacher)


def divergence(p, q, kind, skew, alpha):
    """D of each row, by its definition, with q the teacher's distribution."""

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    if kind == "akl":
        gap, order = (q - p).abs(), q.argsort(-1, descending=True)
        sorted_q, sorted_gap = q.gather(-1, order), gap.gather(-1, order)
        is_head = sorted_q.cumsum(-1) - sorted_q < 1 - alpha
        head = (sorted_gap * is_head).sum(-1)
        share = (head / gap.sum(-1)).detach()  # a weight, as published
        return share * kl(q, p) + (1 - share) * kl(p, q)
    m = (p + q) / 2
    return {
        "kl": lambda: kl(q, p),
        "rkl": lambda: kl(p, q),
        "skl": lambda: kl(q, skew * q + (1 - skew) * p),
        "srkl": lambda: kl(p, skew * p + (1 - skew) * q),
        "js": lambda: (kl(q, m) + kl(p, m)) / 2,
    }[kind]()


def definition(student, teacher, batch, kind, *, skew, alpha, temperature, hotter):
    total, count = 0.0, 0
    for row in range(2):
        for t in range(1, 8):
            same = torch.equal(batch.student.ids_BT[row, : t + 1], batch.teacher.ids_BT[row, : t + 1])
            kept = batch.student.trained_BT[row, t] and batch.teacher.trained_BT[row, t]
            if not same or not kept or t >= min(batch.student.length_B[row], batch.teacher.length_B[row]):
                continue
            p = (student.hidden_BTD[row, t - 1] @ student.head.weight_VD.T / temperature).softmax(-1)
            logits = teacher.hidden_BTD[row, t - 1] @ teacher.head.weight_VD.T
            total = total + divergence(p, (logits / (temperature * hotter)).softmax(-1), kind, skew, alpha)
            count += 1
    return total, count


def states(batch, dtype=torch.float64):
    return make_states(batch, dtype=dtype)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_every_divergence_is_its_definition_in_value_and_gradient(kind):
    batch = one_tokenizer()
    student, teacher = states(batch)
    settings = {"skew": 0.3, "alpha": 0.4, "temperature": 1.5}
    term = kl_loss(student, teacher, batch, divergence=kind, teacher_temperature=0.7, **settings)
    value, count = definition(student, teacher, batch, kind, hotter=0.7, **settings)
    assert term.count == count == 9  # seven tokens of the first row, two of the second
    torch.testing.assert_close(term.total, value, rtol=1e-10, atol=1e-12)
    inputs = (student.hidden_BTD, student.head.weight_VD)
    for one, other in zip(*(torch.autograd.grad(x, inputs) for x in (term.total, value)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert teacher.hidden_BTD.grad is None


def test_a_value_by_hand():
    """Two tokens of two ids: the student gives 1/2 and 1/2, the teacher 3/4 and 1/4."""
    batch = one_tokenizer()
    batch.student.length_B[:], batch.teacher.length_B[:] = torch.tensor([2, 1]), torch.tensor([2, 1])
    for side in (batch.student, batch.teacher):
        side.ids_BT.clamp_(max=1)
    teacher = HiddenStates(torch.ones(2, 10, 1).double(), Head(torch.tensor([[math.log(3)], [0.0]]).double()))
    student = HiddenStates(torch.ones(2, 8, 1).double(), Head(torch.zeros(2, 1).double()))
    term = kl_loss(student, teacher, batch)
    assert term.count == 1
    assert term.total.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_equal_models_are_at_the_minimum_and_masked_tokens_pull_nothing():
    batch = one_tokenizer()
    student, teacher = states(batch)
    same = HiddenStates(
        torch.nn.functional.pad(student.hidden_BTD.detach(), (0, 0, 0, 2)),
        Head(student.head.weight_VD.detach()),
    )
    term = kl_loss(student, same, batch)
    term.total.backward()
    assert term.total.abs() < 1e-12
    assert student.hidden_BTD.grad.abs().max() < 1e-12
    batch.teacher.trained_BT[0, 2:] = False
    student, teacher = states(batch)
    term = kl_loss(student, teacher, batch)
    term.total.backward()
    assert term.count == 3
    assert student.hidden_BTD.grad[0].any(-1).tolist() == [True] + [False] * 7
    batch.student.trained_BT[:] = False
    assert kl_loss(student, teacher, batch) == (0, 1)


def test_padding_and_the_order_of_rows_change_nothing():
    batch = one_tokenizer()
    student, teacher = states(batch)
    before = kl_loss(student, teacher, batch)
    pad = torch.nn.functional.pad
    side = dataclasses.replace(
        batch.student, ids_BT=pad(batch.student.ids_BT, (0, 4)).flip(0),
        length_B=batch.student.length_B.flip(0), trained_BT=pad(batch.student.trained_BT, (0, 4)).flip(0),
    )  # fmt: skip
    other = batch.teacher.map(lambda x: x.flip(0) if x.ndim and len(x) == 2 else x)
    moved = dataclasses.replace(student, hidden_BTD=pad(student.hidden_BTD, (0, 0, 0, 4)).flip(0))
    flipped = dataclasses.replace(teacher, hidden_BTD=teacher.hidden_BTD.flip(0))
    after = kl_loss(moved, flipped, dataclasses.replace(batch, student=side, teacher=other))
    assert before.count == after.count
    torch.testing.assert_close(before.total, after.total)


def test_other_tokenizers_are_refused():
    pair = SimpleNamespace(are_one=lambda: False)
    with pytest.raises(
        ValueError, match="kl compares student and teacher id by id, and their tokenizers differ"
    ):
        make_loss("kl", pair)
    assert make_loss("kl", SimpleNamespace(are_one=lambda: True)).chunks is None
    batch = make_batch()  # of 40 and 50 ids
    with pytest.raises(ValueError, match="the vocabularies have 40 and 50 tokens: their tokenizers differ"):
        kl_loss(*make_states(batch), batch)
    batch = one_tokenizer(ids_mean="one")  # as many ids, and all that is known of one side alone
    assert kl_loss(*states(batch), batch).count == 9
    other = dataclasses.replace(batch, student=dataclasses.replace(batch.student, ids_mean="another"))
    with pytest.raises(ValueError, match="ids of student and teacher stand for different bytes"):
        kl_loss(*states(other), other)
    with pytest.raises(ValueError, match="compares with a teacher: got none"):
        make_loss("kl").prepare(None, batch)


def test_the_students_half_is_one_graph():
    batch = one_tokenizer()
    student, teacher = states(batch, torch.float32)
    loss, context = make_loss("kl"), Context(teacher.head, student.head)
    prepared = loss.prepare(teacher, batch, context)

    def total(one):
        return loss.loss(one, prepared, batch, context).total

    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(total, fullgraph=True, backend="aot_eager")(student), total(student)
    )
