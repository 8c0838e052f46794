"""1, 2 and 4 processes, any number of micro-batches: the same losses, gradients and weights.

Faults tried, each caught here: a scale of latents or DSKD of one micro-batch, or of one rank; padding counted
in the scale; a scale taken before the last micro-batch was measured; means of means.
"""

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.test_gradients import WAYS
from tokenkit.losses.options import CROSS_TOKENIZER
from tokenkit.parallel import World
from tokenkit.training.build import build
from tokenkit.training.step import train_step

SINGLE = World(0, 1, torch.device("cpu"), None)
SPLITS = ((2, 2), (4, 1))  # processes, micro-batches: batches of other lengths each
SCALED = ["clm", "alm_latents", "baseline_dskd"]


def steps(world, config, number=3):
    """Return, by step: losses and counts, then what each loss weighs, the norm of the gradient, the rate."""
    torch.manual_seed(0)
    parts = build(config, world)
    reports = []
    for _ in range(number):
        reports.append(train_step(parts.run, next(parts.batches)))
        parts.run.step += 1
    sizes = [[*report.losses.values(), *report.counts.values()] for report in reports]
    return sizes, [[*r.weights.values(), r.grad_norm, r.learning_rate] for r in reports]


def first_steps(world, configs):
    return [steps(world, config, 1) for config in configs]


def assert_first_steps_agree(make, cases, splits=SPLITS, rtol=1e-6):
    """Hold loss and count of the first step to `rtol`, gradients to what float32 sums leave."""
    one = first_steps(SINGLE, [make(batch_size=16, **case) for case in cases])
    split = {(1, 4): [first_steps(SINGLE, [_cut(make, case, 4) for case in cases])]}
    for world_size, parts in splits:
        split[world_size, parts] = run_ranks(first_steps, world_size, [_cut(make, c, parts) for c in cases])
    for how, ranks in split.items():
        for rank in ranks:
            for case, (sizes, norms), (got_sizes, got_norms) in zip(cases, one, rank, strict=True):
                words = f"{case}, processes and micro-batches {how}"
                for expected, got, tolerance in ((sizes, got_sizes, rtol), (norms, got_norms, 1e-4)):
                    expected, got = torch.tensor(expected), torch.tensor(got)
                    assert expected.isfinite().all()
                    assert torch.allclose(got, expected, rtol=tolerance, atol=0), f"{words}: {got} {expected}"


def _cut(make, case, parts):
    return make(batch_size=16, gradient_accumulation_steps=parts, **case)


def test_every_loss_agrees_and_its_gradient(config_of):
    """With gradmag a loss weighs one over the norm of its gradient: one run shows the gradients of all."""
    cases = [
        {"losses": list(CROSS_TOKENIZER), "multitask_aggregation_fn": "gradmag", "train_model_mode": "full"}
    ]
    assert_first_steps_agree(config_of, cases)


def test_every_kind_of_latents_agrees(config_of, files):
    kinds = [("all_hidden_states", "l1"), ("qkv", "l2"), ("qkv", "l1_channelwise")]
    cases = [
        {"losses": ["alm_latents"], "latents_to_align": align, "latents_normalization": normalization}
        for align, normalization in kinds
    ]
    wide = {"teacher__pretrained_model_name_or_path": files / "teacher", "latents_do_project": "true"}
    cases[0] |= {**wide, "latents_chunks": "space"}
    assert_first_steps_agree(config_of, cases, splits=SPLITS[:1])


def test_every_way_to_weigh_and_join_agrees(config_of):
    """Of each kind of pass; test_gradients.py has all ways, with losses that measure no scale."""
    ways = [WAYS[way] for way in ("balance", "gradmag+pcgrad", "approx_gradmag")]
    uncertainty = {"loss_weight_mode": "uncertainty", "uncertainty_s_init": [0.5, -1.0, 0.0]}
    cases = [{**way, "losses": SCALED, "loss_weights": [2.0, 0.5, 1.0]} for way in (*ways, uncertainty)]
    assert_first_steps_agree(config_of, cases, splits=SPLITS[:1])


def test_the_prefix_stage_agrees(make_config):
    stage = {"n_prefix_layers": 1, "prefix_steps": 2, "prefix_lr": 0.01}
    trainable = ("non_overlapping_embeddings", "embeddings", "all")
    cases = [{**stage, "prefix_trainable": what, "train_model_mode": "full"} for what in trainable]
    cases.append({**stage, "prefix_trainable": "all", "latents_normalization": "l1"})
    assert_first_steps_agree(make_config, cases, splits=((2, 4), (4, 2)))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_processes_agree_with_one_over_steps(make_config, mode):
    config = make_config(train_model_mode=mode, batch_size=8, alm_mode="merge_by_space_prob+append_space")
    expected = steps(SINGLE, config)
    for world_size in (1, 2, 4):
        for result in run_ranks(steps, world_size, config):
            assert_close(result, expected)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_agree_with_one_batch_over_steps(make_config, accumulation):
    settings = {"batch_size": 8, "losses": ["clm", "alm_space"], "distill_chunk_sizes": [1, 2]}
    expected = steps(SINGLE, make_config(**settings))
    assert_close(steps(SINGLE, make_config(**settings, gradient_accumulation_steps=accumulation)), expected)


def test_stages_agree_over_steps(make_config):
    """Through the prefix stage, with micro-batches, into the main stage."""
    stage = {"n_prefix_layers": 1, "prefix_steps": 2, "prefix_lr": 0.01, "steps": 4, "batch_size": 8}
    expected = steps(SINGLE, make_config(**stage))
    for result in run_ranks(steps, 2, make_config(**stage, gradient_accumulation_steps=2)):
        assert_close(result, expected, rtol=1e-3)


def assert_close(result, expected, rtol=2e-5):
    for got, right in zip(result, expected, strict=True):
        for one, other in zip(got, right, strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=rtol, atol=1e-6)
