"""1, 2 and 4 processes, any number of micro-batches: the same losses, gradients and weights."""

import pytest
import torch

from tests.ranks import run_ranks
from tokenkit.parallel import World
from tokenkit.training.build import build
from tokenkit.training.step import train_step

SINGLE = World(0, 1, torch.device("cpu"), None)


def three_steps(world, config):
    """Return losses and gradient norms of three steps."""
    torch.manual_seed(0)
    parts = build(config, world)
    reports = [train_step(parts.run, next(parts.batches)) for _ in range(3)]
    return [[*report.losses.values(), report.grad_norm, *report.counts.values()] for report in reports]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_processes_agree_with_one(make_config, mode):
    config = make_config(train_model_mode=mode, batch_size=8, alm_mode="merge_by_space_prob+append_space")
    expected = torch.tensor(three_steps(SINGLE, config))
    assert expected.isfinite().all()
    for world_size in (1, 2, 4):
        for result in run_ranks(three_steps, world_size, config):
            torch.testing.assert_close(torch.tensor(result), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_agree_with_one_batch(make_config, accumulation):
    settings = {"batch_size": 8, "losses": ["clm", "alm_space"], "distill_chunk_sizes": [1, 2]}
    expected = torch.tensor(three_steps(SINGLE, make_config(**settings)))
    got = three_steps(SINGLE, make_config(**settings, gradient_accumulation_steps=accumulation))
    torch.testing.assert_close(torch.tensor(got), expected, rtol=2e-5, atol=1e-6)


def test_processes_with_micro_batches_agree_too(make_config):
    expected = torch.tensor(three_steps(SINGLE, make_config(batch_size=8)))
    (first, _) = run_ranks(three_steps, 2, make_config(batch_size=8, gradient_accumulation_steps=2))
    torch.testing.assert_close(torch.tensor(first), expected, rtol=2e-5, atol=1e-6)
