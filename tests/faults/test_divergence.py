"""Numbers that leave the finite ones, on any rank, in any pass: all ranks end alike, or skip the step."""

import json

import pytest
import torch

from tests.faults.registry import fault
from tests.ranks import run_ranks
from tokenkit import parallel
from tokenkit.errors import NonFiniteError, exit_code
from tokenkit.kernels import deferred
from tokenkit.training import loop
from tokenkit.training.build import build
from tokenkit.training.step import train_step, whether_skipped

SINGLE = parallel.World(0, 1, torch.device("cpu"), None)


def spoil_states(parts, value, *, of="student"):
    """Put `value` into one real token's last hidden state whenever the model runs."""
    model = parts.run.model.teacher if of == "teacher" else parts.run.model.student
    layer = model.layers[-1]

    def put(module, args, output):
        hidden_BTD = (output[0] if isinstance(output, tuple) else output).clone()
        hidden_BTD[0, 1, 3] = value
        return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD

    return layer.register_forward_hook(put)


@fault(
    "Hidden states or logits that are not finite, in the forward of student or teacher",
    "the losses, the step and a remedy are said; nothing is updated",
    code=70,
    kept="the last checkpoint",
)
@pytest.mark.parametrize(("value", "waits"), [(torch.nan, True), (torch.inf, True), (torch.inf, False)])
@pytest.mark.parametrize("of", ["student", "teacher"])
@pytest.mark.parametrize("losses", [["clm", "alm_unconstrained"], ["alm_latents"], ["baseline_uld"]])
def test_states_that_are_not_finite_end_the_step(make_config, value, waits, of, losses, monkeypatch):
    monkeypatch.setattr(deferred, "waits", lambda tensor: waits)  # a GPU's answers wait for the report
    mode = "full" if of == "teacher" else "lora"
    parts = build(make_config(losses=losses, train_model_mode=mode), SINGLE)
    assert parts.run.is_float32  # so no other dtype is advised
    way_out = "(use another teacher|lower the learning rate)"
    before = [p.detach().clone() for p in parts.run.model.parameters()]
    spoil_states(parts, value, of=of)
    with pytest.raises(NonFiniteError, match=f"at step 0.*nothing was updated.*{way_out}$") as caught:
        train_step(parts.run, next(parts.batches))
    assert exit_code(caught.value) == 70
    assert all(map(torch.equal, before, parts.run.model.parameters()))


@pytest.mark.parametrize("loss", ["clm", "baseline_uld"])
def test_logits_that_overflow_end_the_step(make_config, loss):
    parts = build(make_config(losses=[loss], train_model_mode="full"), SINGLE)
    with torch.no_grad():
        parts.student.output.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match=f"loss {loss} is not finite at step 0"):
        train_step(parts.run, next(parts.batches))


@pytest.mark.parametrize("fn", ["gradmag", "pcgrad", "approx_gradmag_preserve_mag"])
def test_whatever_joins_the_losses_the_end_is_the_same(make_config, fn):
    parts = build(make_config(losses=["clm", "alm_unconstrained"], multitask_aggregation_fn=fn), SINGLE)
    spoil_states(parts, torch.nan)
    with pytest.raises(NonFiniteError, match="loss clm"):
        train_step(parts.run, next(parts.batches))


def test_padding_may_hold_anything(make_config):
    parts = build(make_config(train_model_mode="full"), SINGLE)
    (batch,) = next(parts.batches)
    length_B = batch.student.length_B
    row = int((length_B < batch.student.ids_BT.shape[1]).nonzero()[0])

    def put(module, args, output):
        hidden_BTD = output.clone()
        hidden_BTD[row, length_B[row] :] = torch.nan
        return hidden_BTD

    parts.run.model.student.causal_lm.model.norm.register_forward_hook(put)
    assert torch.isfinite(torch.tensor(train_step(parts.run, [batch]).loss))


@fault(
    "float16 overflows in the forward",
    "the step is skipped and the loss scale halved, as for an overflow of the gradient",
    code="-, 70 after 25 in a row",
    kept="everything",
)
def test_float16_overflow_in_the_forward_is_a_skipped_step(make_config):
    parts = build(make_config(losses=["clm"], dtype="float16"), SINGLE)
    before = [p.detach().clone() for p in parts.run.model.parameters()]
    hook = spoil_states(parts, torch.inf)
    micro_batches = next(parts.batches)
    report = train_step(parts.run, micro_batches)
    assert report.skipped
    assert parts.run.loss_scale.value == 2.0**14
    assert all(map(torch.equal, before, parts.run.model.parameters()))
    parts.run.loss_scale.value = 2.0**-9
    reports = (train_step(parts.run, micro_batches) for _ in range(40))
    with pytest.raises(NonFiniteError, match="loss clm of step 0 is not finite at any loss scale"):
        list(reports)
    hook.remove()
    parts.run.loss_scale.value = 1.0
    assert not train_step(parts.run, micro_batches).skipped


def diverge_on_rank_1(world, config):
    parallel.start = lambda **_: world
    built = loop.build

    def build_and_spoil(config, world):
        parts = built(config, world)
        if world.rank == 1:
            spoil_states(parts, torch.nan)
        return parts

    loop.build = build_and_spoil
    try:
        loop.train(config)
    except NonFiniteError as error:
        return [exit_code(error), str(error)]
    return []


@fault(
    "The same on one rank of several",
    "every rank ends with the same words",
    code=70,
    kept="the last checkpoint",
)
def test_one_rank_that_diverges_ends_all_alike(make_config, tmp_path):
    config = make_config(eval_interval=100, steps=8, eval_at_step_zero="false")
    said = run_ranks(diverge_on_rank_1, 2, config, always_shard=False)
    assert said[0] == said[1]
    assert said[0][0] == 70
    assert "loss clm, alm_unconstrained is not finite at step 0" in said[0][1]
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["code"], outcome["outcome"]) == (70, "numerics")


def spoil_steps(monkeypatch, spoiled, value=torch.nan):
    """Put `value` into the student's states of these steps of a run, counted from 0."""
    step = loop.train_step

    def take(run, micro_batches):
        class Parts:
            pass

        parts = Parts()
        parts.run = run
        hook = spoil_states(parts, value) if run.step in spoiled else None
        try:
            return step(run, micro_batches)
        finally:
            if hook is not None:
                hook.remove()

    monkeypatch.setattr(loop, "train_step", take)


@fault(
    "A loss or gradient that is not finite, with `skip_nonfinite: N`",
    "N steps of the run are skipped on all ranks, written and counted; one more ends it",
    code="-, 70",
    kept="the last checkpoint",
)
def test_as_many_steps_are_skipped_as_may_be(make_config, tmp_path, monkeypatch, capfd):
    changes = {"losses": ["clm"], "steps": 6, "save_interval": 3, "eval_interval": 100, "skip_nonfinite": 2}
    config = make_config(**changes, eval_at_step_zero="false")
    spoil_steps(monkeypatch, {1, 3, 4})
    with pytest.raises(NonFiniteError, match=r"at step 4 \(2 such steps were skipped\): nothing was updated"):
        loop.train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["nonfinite_steps"]) for x in lines if "nonfinite_steps" in x] == [(2, 1), (4, 2)]
    monkeypatch.undo()
    spoil_steps(monkeypatch, {3})  # the count goes on where the checkpoint of step 3 had it
    resumed = make_config(**changes, eval_at_step_zero="false", resume="true")
    assert loop.train(resumed) == 0
    assert "steps skipped, because a loss or gradient was not finite: 2" in capfd.readouterr().err


def skip_on_one_rank(world, config):
    parts = build(config, world)
    moving = [p for p in parts.run.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in moving]
    hook = spoil_states(parts, torch.nan) if world.rank == 1 else None
    first = train_step(parts.run, next(parts.batches)).skipped
    kept = all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(before, moving, strict=True))
    if hook is not None:
        hook.remove()
    return [first, kept, not parts.run.optimizer.state, train_step(parts.run, next(parts.batches)).skipped]


def test_one_rank_lets_all_skip_and_nothing_moves(make_config):
    found = run_ranks(skip_on_one_rank, 2, make_config(skip_nonfinite=1))
    assert found == [["nonfinite", True, True, None]] * 2


@fault(
    "A gradient that is a million times too large, and finite",
    "cut to `optimizer.max_grad_norm` over all ranks; `grad_norm` in metrics.jsonl shows it",
    code="-",
    kept="everything",
)
def test_a_spike_moves_no_more_than_the_longest_step(make_config):
    moved, norms = [], []
    for factor in (1.0, 1e6):
        parts = build(
            make_config(losses=["clm"], train_model_mode="full", optimizer__max_grad_norm=1.0), SINGLE
        )
        before = [p.detach().clone() for p in parts.run.model.parameters()]
        moving = [p for p in parts.run.model.parameters() if p.requires_grad]
        for parameter in moving:
            parameter.register_hook(lambda grad, factor=factor: grad * factor)
        norms.append(train_step(parts.run, next(parts.batches)).grad_norm)
        assert torch.nn.utils.get_total_norm([p.grad for p in moving]) <= 1.0 + 1e-5
        moved.append([a - b for a, b in zip(parts.run.model.parameters(), before, strict=True)])
    assert norms[1] == pytest.approx(1e6 * norms[0], rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*moved, strict=True))


@fault(
    "A learning rate that throws the weights out of the finite numbers",
    "found at the next step or evaluation, before anything is saved or exported",
    code=70,
    kept="the last checkpoint",
)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_rate_that_is_far_too_high_is_70_and_not_the_configurations_fault(make_config, tmp_path, steps):
    config = make_config(
        train_model_mode="full", optimizer__learning_rate=1e38, steps=steps, save_interval=1, eval_interval=1
    )
    with pytest.raises(NonFiniteError):
        loop.train(config)
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["code"], outcome["step"]) == (70, 1)
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_prefix_stage_ends_or_skips_its_step_too(make_config, dtype):
    changes = {"prefix_steps": 2, "n_prefix_layers": 1, "prefix_trainable": "embeddings", "dtype": dtype}
    parts = build(make_config(losses=["clm"], **changes), SINGLE)
    with torch.no_grad():
        parts.student.embedding.weight[5:].fill_(torch.nan)
    if dtype == "float16":
        assert train_step(parts.run, next(parts.batches)).skipped == "overflow"
        return
    with pytest.raises(NonFiniteError, match="loss prefix is not finite at step 0"):
        train_step(parts.run, next(parts.batches))


@pytest.mark.parametrize(("dtype", "advises"), [("bfloat16", True), ("float32", False)])
def test_float32_is_advised_where_it_is_not_in_use(make_config, dtype, advises):
    run = build(make_config(losses=["clm"], dtype=dtype), SINGLE).run
    for losses, norm in (({"clm": torch.nan}, 1.0), ({"clm": 1.0}, torch.inf)):
        with pytest.raises(NonFiniteError) as caught:
            whether_skipped(run, losses, norm, trained=3)
        assert ("use dtype float32" in str(caught.value)) == advises
        assert "lower the learning rate" in str(caught.value)
