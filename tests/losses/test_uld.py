"""baseline_uld from the answer's start: TRL's positional and extended losses, and where texts begin."""

import dataclasses

import pytest
import torch

from tests.losses import published
from tests.losses.published import inputs
from tokenkit.losses import uld_loss
from tokenkit.structs import Batch, Chunks, Shard, Side


def gradients(loss, student):
    loss.backward()
    return loss.detach(), student.hidden_BTD.grad, student.head.weight_VD.grad


@pytest.mark.parametrize("extended", [False, True])
def test_documents_alone_have_trls_value_and_gradient(extended):
    """One document at a time: TRL averages over documents, this loss over positions."""
    pytest.importorskip("trl.experimental.gold")  # which takes seconds
    case = {"use_extended_uld": extended, "uld_token_merge_strategy": "bayesian"}
    case |= {"uld_skip_student_eos": False, "uld_skip_teacher_eos": False}
    for seed in range(6):
        results = []
        for by_trl in (True, False):
            given, batch, student, teacher = inputs(seed, 1)
            if by_trl:
                loss = published.published(given, batch, student, teacher, case)
            else:
                total, count = uld_loss(student, teacher, batch, exact=True, extended=extended)
                loss = total / count
            results.append(gradients(loss, student))
        for truth, value in zip(*results, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-12)


def longer(batch, states, by):
    """Put `by` more untrained tokens in front of the teacher's documents."""
    side, chunks = batch.teacher, batch.chunks["unconstrained"]

    def pad(tensor, value):
        return torch.nn.functional.pad(tensor, (by, 0), value=value)

    grown = dataclasses.replace(
        side,
        ids_BT=pad(side.ids_BT, 1),
        length_B=side.length_B + by,
        trained_BT=pad(side.trained_BT, False),
    )
    hidden = torch.nn.functional.pad(states.hidden_BTD, (0, 0, by, 0), value=0.3)
    states = dataclasses.replace(states, hidden_BTD=hidden)
    grown_chunks = Chunks(chunks.student_BT, pad(chunks.teacher_BS, -1))
    return Batch(batch.student, grown, {"unconstrained": grown_chunks}), states


@pytest.mark.parametrize("options", [{}, {"extended": True}], ids=str)
@pytest.mark.parametrize("by", [1, 3])
def test_the_prompts_length_is_nothing_to_it(by, options):
    results = []
    for grows in (False, True):
        _, batch, student, teacher = inputs()
        if grows:
            batch, teacher = longer(batch, teacher, by)
        total, count = uld_loss(student, teacher, batch, exact=True, **options)
        results.append((*gradients(total, student), count))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def text(ids, chunk_ids, vocab):
    return Side(
        torch.tensor([ids]), torch.tensor([len(ids)]), torch.ones(1, len(ids), dtype=torch.bool)
    ), torch.tensor([chunk_ids], dtype=torch.int32)


@pytest.mark.parametrize("has_chunks", [True, False])
def test_a_bos_that_one_side_has_alone_shifts_nothing(has_chunks):
    """Student [BOS] a b c, teacher a b c d: what predicts b and c faces what predicts b and c."""
    _, _, student, teacher = inputs()
    student = dataclasses.replace(student, hidden_BTD=student.hidden_BTD[:1, :4].detach().requires_grad_())
    teacher = dataclasses.replace(teacher, hidden_BTD=teacher.hidden_BTD[:1, :4])
    sides = [text([1, 5, 6, 7], [-1, 0, 1, 2], 19), text([5, 6, 7, 8], [0, 1, 2, -1], 23)]
    chunks = {"unconstrained": Chunks(sides[0][1], sides[1][1])} if has_chunks else {}
    term = uld_loss(student, teacher, Batch(sides[0][0], sides[1][0], chunks), exact=True)
    p, q = ((x.hidden_BTD[0] @ x.head.weight_VD.T).softmax(-1).detach() for x in (student, teacher))
    rows = [(1, 0), (2, 1)] if has_chunks else [(0, 0), (1, 1), (2, 2)]
    expected = 0.0
    for i, j in rows:
        a, b = p[i].sort(descending=True).values, q[j].sort(descending=True).values
        expected += float((torch.nn.functional.pad(a, (0, 4)) - b).abs().sum())
    assert int(term.count) == len(rows)
    assert float(term.total.detach()) == pytest.approx(expected, rel=1e-12)


def test_each_answer_of_a_conversation_is_counted_from_its_own_start():
    """Two answers, with more between them on the teacher's side."""
    _, _, student, teacher = inputs()
    student = dataclasses.replace(student, hidden_BTD=student.hidden_BTD[:1, :7])
    teacher = dataclasses.replace(teacher, hidden_BTD=teacher.hidden_BTD[:1, :9])
    one, two = text(list(range(7)), [-1] * 7, 19)[0], text(list(range(9)), [-1] * 9, 23)[0]
    one = dataclasses.replace(one, trained_BT=torch.tensor([[0, 1, 1, 0, 0, 1, 1]]) > 0)
    two = dataclasses.replace(two, trained_BT=torch.tensor([[0, 0, 1, 0, 0, 0, 1, 1, 1]]) > 0)
    term = uld_loss(student, teacher, Batch(one, two, {}), exact=True)
    p, q = ((x.hidden_BTD[0] @ x.head.weight_VD.T).softmax(-1).detach() for x in (student, teacher))
    expected = 0.0
    for i, j in ((0, 1), (4, 5), (5, 6)):
        a, b = p[i].sort(descending=True).values, q[j].sort(descending=True).values
        expected += float((torch.nn.functional.pad(a, (0, 4)) - b).abs().sum())
    assert int(term.count) == 3
    assert float(term.total.detach()) == pytest.approx(expected, rel=1e-12)


def test_extended_uld_refuses_a_divided_head():
    _, batch, student, teacher = inputs()
    head = dataclasses.replace(teacher.head, shard=Shard(None, 0), vocab_size=23)
    teacher = dataclasses.replace(teacher, head=head)
    with pytest.raises(ValueError, match="divided over processes: baseline_uld with extended"):
        uld_loss(student, teacher, batch, extended=True)
