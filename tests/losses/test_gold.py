"""baseline_gold is TRL's: each option, values and gradients, against its code and frozen values of it."""

import json

import pytest
import torch

from tests.losses import published
from tests.losses.published import CASES, FROZEN, inputs, name_of, pair_ids, summary
from tokenkit.losses import gold_loss

VALUES = json.loads(FROZEN.read_text(encoding="utf-8"))["values"]


def ours(batch, student, teacher, case):
    """Return our loss, its pairs given in any order."""
    ids = [index.flip(0) for index in pair_ids()] if case.get("uld_use_hybrid_loss") else []
    term = gold_loss(student, teacher, batch, *ids, **case)
    return (term.total / term.count).mean()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_frozen_values_of_trl(case):
    _, batch, student, teacher = inputs()
    got, truth = (
        torch.tensor(summary(ours(batch, student, teacher, case), student)),
        torch.tensor(VALUES[name_of(case)]),
    )
    torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9)
    assert teacher.hidden_BTD.grad is None


@pytest.mark.parametrize("seed", range(1, 4))
def test_values_and_gradients_equal_trls(seed):
    # some seconds: TRL is imported
    pytest.importorskip("trl.experimental.gold")
    for case in CASES:
        results = []
        for by_trl in (True, False):
            given, batch, student, teacher = inputs(seed)
            if by_trl:
                loss = published.published(given, batch, student, teacher, case).sum()
            else:
                loss = ours(batch, student, teacher, case)
            loss.backward()
            results.append((loss.detach(), student.hidden_BTD.grad, student.head.weight_VD.grad))
        for name, truth, value in zip(("loss", "hidden", "weight"), *results, strict=True):
            error = float((value - truth).abs().max() / truth.abs().max())
            assert error < 1e-9, (case, name, error)
