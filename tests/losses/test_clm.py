"""Next-token prediction against torch's cross entropy."""

from dataclasses import replace

import torch

from tests.losses.example import make_batch, make_states
from tokenkit.losses import clm_loss


def test_equals_cross_entropy_over_scored_tokens():
    trained = torch.ones(2, 8, dtype=torch.bool)
    trained[0, 2:4] = False
    batch = make_batch(trained=trained)
    student, _ = make_states(batch)
    term = clm_loss(student, batch)
    (term.total / term.count).backward()

    hidden = student.hidden_BTD.detach().requires_grad_()
    scores = hidden[:, :-1] @ student.head.weight_VD.T
    targets = batch.student.ids_BT[:, 1:].where(batch.student.trained_BT[:, 1:], -100)
    truth = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
    truth.backward()
    assert term.count == (targets != -100).sum() == 10
    torch.testing.assert_close((term.total / term.count).detach(), truth.detach())
    torch.testing.assert_close(student.hidden_BTD.grad, hidden.grad)


def test_no_scored_token_is_zero_and_pulls_nothing():
    batch = make_batch(trained=torch.zeros(2, 8, dtype=torch.bool))
    student, _ = make_states(batch)
    term = clm_loss(student, batch)
    (term.total / term.count).backward()
    assert term.total == 0
    assert not student.hidden_BTD.grad.any()


def test_a_hidden_state_behind_the_end_is_never_read():
    batch = make_batch()
    student, _ = make_states(batch)
    with torch.no_grad():
        student.hidden_BTD[1, 6:] = torch.nan
    assert torch.isfinite(clm_loss(student, batch).total)


def test_a_mask_that_reaches_into_the_padding_is_cut():
    batch = make_batch()
    careless = replace(batch.student, trained_BT=torch.ones(2, 8, dtype=torch.bool))
    student, _ = make_states(batch)
    assert clm_loss(student, replace(batch, student=careless)).count == 7 + 5


def test_under_autocast_sums_stay_float32():
    batch = make_batch()
    student, _ = make_states(batch, dtype=torch.float32)
    truth = clm_loss(student, batch).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        term = clm_loss(student, batch)
        term.total.backward()
    assert torch.equal(term.total, truth)
    assert student.head.weight_VD.grad.dtype == torch.float32
