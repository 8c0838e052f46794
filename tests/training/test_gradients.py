"""Each way to join losses: against its definition, and the same on any number of processes."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from tests.tiny import tiny_folder
from tokenkit.errors import NonFiniteError
from tokenkit.losses.options import CROSS_TOKENIZER
from tokenkit.parallel import World, set_gradient_sync
from tokenkit.training.build import build
from tokenkit.training.gradients import Passes, accumulate, trained_parameters
from tokenkit.training.step import global_counts, prepare, train_step

SINGLE = World(0, 1, torch.device("cpu"), None)

WAYS = {
    "static": {"loss_weights": [2.0, 0.5]},
    "uncertainty": {"loss_weight_mode": "uncertainty", "uncertainty_s_init": [0.5, -1.0]},
    "balance": {"loss_weight_mode": "balance", "loss_weights": [2.0, 0.5]},
    "ema": {"loss_weight_mode": "ema"},
    "gradmag": {"multitask_aggregation_fn": "gradmag", "loss_weights": [2.0, 0.5]},
    "gradclip": {"multitask_aggregation_fn": "gradclip:0.3"},
    "pcgrad": {"multitask_aggregation_fn": "pcgrad"},
    "balance+pcgrad": {"multitask_aggregation_fn": "pcgrad", "loss_weight_mode": "balance"},
    "gradmag+pcgrad": {"multitask_aggregation_fn": "gradmag+pcgrad"},
    "gradnorm": {"multitask_aggregation_fn": "gradnorm"},
    "approx_gradmag": {"multitask_aggregation_fn": "approx_gradmag", "loss_weights": [2.0, 0.5]},
    "approx_gradmag_preserve_mag": {"multitask_aggregation_fn": "approx_gradmag_preserve_mag"},
}


def passes_of(parts, world):
    """What the passes of the run's next step read."""
    run, batches = parts.run, next(parts.batches)
    prepared = prepare(run, batches)
    return Passes(
        model=run.model,
        objective=run.objective,
        world=world,
        step=run.step,
        scale=run.loss_scale.factor,
        batches=batches,
        prepared=prepared,
        counts=global_counts(prepared, run),
    )


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_step(world, config):
    """Return the gradient of the first step as one vector, and the weights of the losses."""
    torch.manual_seed(0)
    parts = build(config, world)
    set_gradient_sync(parts.run.model, False)  # as a step that was left in the middle would leave it
    sums = accumulate(passes_of(parts, world))
    parameters = trained_parameters(parts.run.model)
    grads = [whole(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    return {"gradient": torch.cat(grads), "weights": sums.weight_J, "norms": sums.norm_J}


def first_steps(world, configs):
    return [first_step(world, config) for config in configs]


def definition(config, way):
    """The same from the losses' whole gradients, one process, one batch, a line or two of torch each."""
    torch.manual_seed(0)
    parts = build(config, SINGLE)
    passes = passes_of(parts, SINGLE)
    parameters, last = trained_parameters(parts.run.model), list(parts.run.model.last_layer.parameters())
    means = passes.means(0)
    grads = [torch.autograd.grad(mean, parameters, retain_graph=True, allow_unused=True) for mean in means]
    g = torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if x is None else x).flatten()
                    for p, x in zip(parameters, one, strict=True)
                ]
            )
            for one in grads
        ]
    )
    at_last = torch.stack(
        [
            torch.cat(
                [x.flatten() for p, x in zip(parameters, one, strict=True) if any(p is q for q in last)]
            )
            for one in grads
        ]
    )
    loss, weight = torch.stack(means).detach(), torch.tensor(WAYS[way].get("loss_weights", [1.0, 1.0]))
    norm, last_norm = g.norm(dim=1), at_last.norm(dim=1)
    factors = {
        "static": torch.ones(2),
        "uncertainty": torch.tensor([-0.5, 1.0]).exp(),
        "balance": 1 / loss,
        "ema": 1 / loss,
        "gradmag": 1 / norm,
        "gradclip": (0.3 / norm).clamp_max(1),
        "pcgrad": torch.ones(2),
        "balance+pcgrad": 1 / loss,
        "gradmag+pcgrad": 1 / norm,
        "gradnorm": torch.ones(2),
        "approx_gradmag": 1 / last_norm,
        "approx_gradmag_preserve_mag": (1 / last_norm) / (1 / last_norm).sum(),
    }
    g = factors[way][:, None] * g
    if "pcgrad" in way:
        assert g[0] @ g[1] < 0, "nothing to project"
        g = torch.stack([x - (x @ y) / (y @ y) * y for x, y in ((g[0], g[1]), (g[1], g[0]))])
    return weight @ g


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * float(expected.norm()))


@pytest.fixture
def config_of(make_config):
    def make(way, **changes):
        settings = {"train_model_mode": "full", "batch_size": 8, "losses": ["clm", "alm_space"]}
        return make_config(**{**settings, **WAYS.get(way, {}), **changes})

    return make


@pytest.fixture(scope="module")
def alone():
    """What one process finds in one batch, by way; filled by whoever needs it first."""
    return {}


def first_step_alone(alone, config_of, way):
    if way not in alone:
        alone[way] = first_step(SINGLE, config_of(way))
    return alone[way]


@pytest.mark.parametrize("way", WAYS)
def test_one_process_and_one_batch_is_the_definition(config_of, alone, way):
    close(first_step_alone(alone, config_of, way)["gradient"], definition(config_of(way), way))


EVERY_ORDER_OF_PASSES = ["static", "balance", "balance+pcgrad", "gradmag", "gradnorm", "approx_gradmag"]


@pytest.mark.parametrize("way", EVERY_ORDER_OF_PASSES)
def test_micro_batches_make_no_difference(config_of, alone, way):
    expected = first_step_alone(alone, config_of, way)
    got = first_step(SINGLE, config_of(way, gradient_accumulation_steps=4))
    close(got["gradient"], expected["gradient"])
    torch.testing.assert_close(got["norms"], expected["norms"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", ["gradmag", "approx_gradmag"])
def test_adapters_are_joined_like_whole_weights(config_of, way):
    config = config_of(way, train_model_mode="lora")
    whole_batch = first_step(SINGLE, config)
    close(
        first_step(SINGLE, config_of(way, train_model_mode="lora", gradient_accumulation_steps=4))[
            "gradient"
        ],
        whole_batch["gradient"],
    )
    (sharded, _) = run_ranks(first_step, 2, config)
    close(sharded["gradient"], whole_batch["gradient"])


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 2), (4, 1)])
def test_processes_make_no_difference(config_of, alone, world_size, accumulation):
    ways = EVERY_ORDER_OF_PASSES
    expected = [first_step_alone(alone, config_of, way) for way in ways]
    configs = [config_of(way, gradient_accumulation_steps=accumulation) for way in ways]
    ranks = run_ranks(first_steps, world_size, configs)
    for way, one, *got in zip(ways, expected, *ranks, strict=True):
        for other in got:
            assert torch.equal(other["weights"], got[0]["weights"]), f"{way}: ranks hold other weights"
            close(other["gradient"], one["gradient"])
            torch.testing.assert_close(other["norms"], one["norms"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", [None, "gradmag", "approx_gradmag"])
def test_a_loss_that_reads_inside_a_layer_finds_its_weights_gathered(config_of, way):
    """FSDP2 gathers a layer for the backward when a gradient arrives at its end, and here none would."""
    losses = ["alm_latents"] if way is None else ["clm", "alm_latents"]
    config = config_of(way, losses=losses, latents_to_align="qkv")
    (sharded,) = run_ranks(first_step, 1, config)
    close(sharded["gradient"], first_step(SINGLE, config)["gradient"])


NEED_FILES = ("alm_unbiased", "baseline_mined")  # they run the kernels of alm_space and alm_side_path


@pytest.mark.parametrize("name", sorted(set(CROSS_TOKENIZER) - {"clm", *NEED_FILES}))
def test_the_backward_of_every_loss_may_run_twice_on_one_graph(config_of, name):
    config = config_of("approx_gradmag", losses=["clm", name])
    close(first_step(SINGLE, config)["gradient"], definition(config, "approx_gradmag"))


def walks_of_the_trunk(parts):
    """Count how often a backward pass goes through the layer below the last one in one step."""
    walks = []
    trunk = parts.run.model.student.layers[-2]
    trunk.register_full_backward_hook(lambda *_: walks.append(1))
    train_step(parts.run, next(parts.batches))
    return len(walks)


@pytest.mark.parametrize("way", ["approx_gradmag", "approx_gradmag_preserve_mag", "gradnorm"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_compared_at_the_last_layer_walk_the_trunk_once(config_of, way, accumulation):
    parts = build(config_of(way, gradient_accumulation_steps=accumulation), SINGLE)
    assert walks_of_the_trunk(parts) == accumulation, "once for each micro-batch"


def test_whole_gradients_walk_the_trunk_once_per_loss(config_of):
    assert walks_of_the_trunk(build(config_of("gradmag"), SINGLE)) == 2


@pytest.mark.parametrize("way", ["balance", "gradmag", "approx_gradmag"])
def test_gradient_checkpointing_changes_no_gradient(config_of, alone, way):
    expected = first_step_alone(alone, config_of, way)
    for accumulation in (1, 2):
        changes = {"gradient_checkpointing": "true", "gradient_accumulation_steps": accumulation}
        close(first_step(SINGLE, config_of(way, **changes))["gradient"], expected["gradient"])


@pytest.mark.parametrize("way", ["balance", "approx_gradmag"])
def test_a_pass_that_comes_first_sees_the_same_dropout(config_of, tmp_path, way):
    """In the last layer every loss keeps the masks that the main pass will draw."""
    model = tiny_folder(tmp_path / "model", attention_dropout=0.5)
    changes = {"student__pretrained_model_name_or_path": model, "gradient_accumulation_steps": 2}
    parts = build(config_of(way, **changes), SINGLE)
    passes = passes_of(parts, SINGLE)
    torch.manual_seed(1)
    weighed = accumulate(passes)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    means = sum(torch.stack(passes.means(index)).detach() for index in range(2))
    assert torch.equal(torch.get_rng_state(), after), "the first pass moved the generator"
    torch.testing.assert_close(weighed.mean_J, means)
    if way == "balance":
        torch.testing.assert_close((weighed.weight_J * means).tolist(), [2.0, 0.5])


@pytest.mark.parametrize("way", ["gradmag", "pcgrad", "approx_gradmag", "gradnorm", "balance"])
def test_float16_with_its_loss_scale_stays_close(config_of, way):
    losses = []
    for dtype in ("float32", "float16"):
        config = config_of(way, dtype=dtype, gradient_accumulation_steps=2)
        report = train_step((parts := build(config, SINGLE)).run, next(parts.batches))
        assert not report.skipped
        losses.append([report.grad_norm, *report.weights.values()])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0.1, atol=0)


@pytest.mark.parametrize("way", ["gradmag", "gradclip", "approx_gradmag", "approx_gradmag_preserve_mag"])
def test_a_gradient_that_is_not_finite_is_refused_and_not_weighed_away(config_of, way):
    own = "tests.training.own_losses:not_finite_backward"
    parts = build(config_of(way, losses=["clm", own]), SINGLE)
    before = [parameter.detach().clone() for parameter in parts.run.model.parameters()]
    with pytest.raises(NonFiniteError, match="gradient norm is not finite at step 0"):
        train_step(parts.run, next(parts.batches))
    assert all(map(torch.equal, before, parts.run.model.parameters()))


def test_a_step_that_overflows_teaches_the_weights_nothing(config_of):
    own = "tests.training.own_losses:not_finite_backward"
    changes = {"losses": ["clm", own], "dtype": "float16", "loss_weight_mode": "uncertainty"}
    parts = build(config_of(None, **changes), SINGLE)
    assert train_step(parts.run, next(parts.batches)).skipped
    assert parts.run.objective.log_variances == [0.0, 0.0]


def test_where_nothing_in_the_last_layer_is_trained_that_is_said(config_of):
    parts = build(config_of("approx_gradmag", train_model_mode="none"), SINGLE)
    with pytest.raises(ValueError, match="nothing in it is trained"):
        train_step(parts.run, next(parts.batches))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_does_not_reach_the_last_layer_is_named(config_of, accumulation):
    own = "tests.training.own_losses:of_the_head_alone"
    changes = {"losses": ["clm", own], "gradient_accumulation_steps": accumulation}
    parts = build(config_of("approx_gradmag", loss_weights=[1.0, 1.0], **changes), SINGLE)
    with pytest.raises(ValueError, match=f"loss {own} sends no gradient to the student's layers"):
        train_step(parts.run, next(parts.batches))


@pytest.mark.parametrize("way", ["gradmag", "approx_gradmag", "balance", "static"])
def test_a_loss_without_anything_to_compare_weighs_nothing(config_of, way):
    own = "tests.training.own_losses:nothing"
    parts = build(config_of(way, losses=["clm", own], loss_weights=[1.0, 1.0]), SINGLE)
    report = train_step(parts.run, next(parts.batches))
    assert report.losses[own] == 0
    assert report.weights[own] == (1 if way == "static" else 0)
    assert report.grad_norm > 0
