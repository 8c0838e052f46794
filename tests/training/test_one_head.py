"""Losses that need log-probabilities share one pass of each head.

Faults tried, each caught here: the part of one loss not cut out of the answer; a mass asked of the rows of
another subset; requests of two temperatures in one call; the teacher asked once per loss.
"""

import pytest
import torch

from tests.losses.example import make_batch, make_states
from tests.training.test_gradients import SINGLE, WAYS, first_step
from tokenkit.kernels.linear_logprob import split_vocabulary
from tokenkit.losses import score
from tokenkit.losses.logprobs import LogprobRequest, answer
from tokenkit.training import distillation

TOGETHER = {
    "clm+alm": (["clm", "alm_unconstrained"], 3),
    "all": (["clm", "alm_unconstrained", "alm_space", "baseline_mined", "alm_side_path"], 6),
}
"""Losses, and how often they would ask a head one by one."""


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of the kernel had."""
    found, kernel = [], score.linear_logprob

    def count(hidden_ND, *rest, **options):
        found.append(len(hidden_ND))
        return kernel(hidden_ND, *rest, **options)

    monkeypatch.setattr(score, "linear_logprob", count)
    return found


@pytest.mark.parametrize(
    ("together", "way"),
    [("clm+alm", "static"), ("clm+alm", "gradmag"), ("clm+alm", "approx_gradmag"), ("all", "static")],
)
def test_a_step_asks_each_head_once(make_config, files, calls, monkeypatch, together, way):
    names, apart_calls = TOGETHER[together]
    settings = {name: value for name, value in WAYS[way].items() if name != "loss_weights"}
    if together == "all":
        settings["mined_mapping_path"] = files / "mapping.npy"
    config = make_config(losses=names, train_model_mode="full", **settings)
    joined = first_step(SINGLE, config)
    assert len(calls) == 2, "one of the teacher, one of the student"
    del calls[:]
    monkeypatch.setattr(distillation, "answer", lambda states, requests: {})
    apart = first_step(SINGLE, config)
    assert len(calls) == apart_calls
    # gradients that are divided by their norm show the rounding of the smallest
    most = 1e-6 if way == "static" else 2e-6
    for name in ("gradient", "weights", "norms"):
        size = float(apart[name].norm().clamp_min(1e-30))
        assert float((joined[name] - apart[name]).norm()) <= most * size, name


def test_requests_of_other_subsets_and_temperatures_are_calls_of_their_own(calls):
    batch = make_batch()
    states, _ = make_states(batch)
    side = batch.student
    token_BT = score.scored_tokens(side)
    few_BT = token_BT.clone()
    few_BT[0] = False
    mass_BT = token_BT.roll(1, 1)
    space, other = split_vocabulary(side.space_V), split_vocabulary(~side.space_V)
    again = split_vocabulary(side.space_V.clone())
    requests = {
        "all": LogprobRequest(side, token_BT),
        "few": LogprobRequest(side, few_BT, mass_BT, space),
        "none": None,
        "same": LogprobRequest(side, token_BT, few_BT, again),
        "other": LogprobRequest(side, token_BT, mass_BT, other),
        "warm": LogprobRequest(side, token_BT, temperature=2.0),
    }
    found = answer(states, requests)
    assert len(calls) == 3
    assert "none" not in found
    for name, request in requests.items():
        if request is None:
            continue
        (alone,) = answer(states, {name: request}).values()
        torch.testing.assert_close(found[name].logp_BT, alone.logp_BT)
        if request.subset is None:
            assert found[name].mass_BT is None
        else:
            at = request.mass_BT
            torch.testing.assert_close(found[name].mass_BT[at], alone.mass_BT[at])
