"""One optimizer step, and everything that changes in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tokenkit.errors import DataError, NonFiniteError
from tokenkit.kernels import deferred
from tokenkit.kernels.not_finite import NotFiniteError
from tokenkit.objective.weights import Objective
from tokenkit.optim import set_learning_rate
from tokenkit.parallel import World, clip_grad_norm
from tokenkit.structs import Batch
from tokenkit.training.clock import Clock
from tokenkit.training.gradients import Passes, Sums, accumulate, trained_parameters
from tokenkit.training.requests import step_counts, teacher_halves

SMALLEST_SCALE = 2.0**-10  # twenty-five overflows in a row: it is the model that overflows, not the scale


MOST_UNTRAINED = 10  # steps in a row without a trained token: it is the configuration, not the draw


@dataclass(kw_only=True)
class LossScale:
    """The factor that keeps float16 gradients off the bottom of their range; 1 for other types.

    Source: Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740.
    """

    enabled: bool
    value: float = 2.0**15
    good_steps: int = 0
    grow_every: int = 1000

    @property
    def factor(self) -> float:
        """What the loss is multiplied by."""
        return self.value if self.enabled else 1.0

    def update(self, finite: bool, what: str = "the gradient norm") -> None:
        """Halve after an overflow of `what`, double after `grow_every` steps without one.

        Raises:
            NonFiniteError: the scale is so small that the overflow cannot come from it.
        """
        if not finite:
            self.value, self.good_steps = self.value / 2, 0
            if self.value < SMALLEST_SCALE:
                raise NonFiniteError(
                    f"{what} is not finite at any loss scale down to {SMALLEST_SCALE:g}: nothing was "
                    "updated; lower the learning rate, or use dtype bfloat16 or float32"
                )
            return
        self.good_steps += 1
        if self.good_steps % self.grow_every == 0:
            self.value *= 2


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of steps: what moves in it, towards what and how fast."""

    objective: Objective
    optimizer: Optimizer
    learning_rate: Callable[[int], float]
    """By steps of the stage."""
    first_step: int = 0
    """Optimizer steps of the run before it."""
    name: str | None = None
    """Its phase in metrics.jsonl; None: the main stage."""
    moving: tuple[nn.Parameter, ...] = ()
    """What moves. Empty: all that is trained."""
    frozen: tuple[nn.Parameter, Tensor] | None = None
    """A parameter, and bool [rows here], true for the rows that stay as they are."""
    layers: tuple[nn.Module, ...] | None = None
    """The student's layers that it runs; None: all."""

    @property
    def is_prefix(self) -> bool:
        """It runs the first layers alone."""
        return self.layers is not None


@dataclass(kw_only=True)
class Run:
    """Everything that changes while training, hence everything that a checkpoint holds."""

    model: nn.Module
    stages: tuple[Stage, ...]
    """In order; the last is the main one."""
    world: World
    max_grad_norm: float | None
    is_float32: bool
    """Computed in float32: no other type would help where numbers are not finite."""
    loss_scale: LossScale = field(default_factory=lambda: LossScale(enabled=False))
    step: int = 0
    """Optimizer steps done, of all stages."""
    untrained_steps: int = 0
    """Steps without a trained token, of all stages: nothing was updated."""
    untrained_in_a_row: int = 0
    """Such steps since the last other one, or since this process began."""
    may_skip: int = 0
    """Steps of the run that may be skipped because a loss or gradient is not finite (`skip_nonfinite`)."""
    nonfinite_steps: int = 0
    """Such steps, of all stages."""
    has_compared: bool = False
    """The gradients of the losses were compared, which happens once."""
    clock: Clock = field(default_factory=Clock)

    @property
    def stage(self) -> Stage:
        """The stage of the step that is next."""
        return next(stage for stage in reversed(self.stages) if stage.first_step <= self.step)

    @property
    def main(self) -> Stage:
        """The stage of the losses that were asked for."""
        return self.stages[-1]

    @property
    def prefix(self) -> Stage | None:
        """The stage of the first layers, where there is one."""
        return self.stages[0] if self.stages[0].is_prefix else None

    @property
    def objective(self) -> Objective:
        """That of the main stage, which a checkpoint holds."""
        return self.main.objective

    @property
    def optimizer(self) -> Optimizer:
        """That of the main stage, of all that is trained."""
        return self.main.optimizer

    def add_up(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return sums over all ranks of the step that is next, by name."""
        return self.world.all_reduce(local, self.step)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did; the same on every rank."""

    loss: float
    """Σ loss_weights · schedule · loss, nats: weights that move by themselves would hide the losses' fall."""
    losses: dict[str, float]
    counts: dict[str, float]
    grad_norm: float
    learning_rate: float
    weights: dict[str, float] = field(default_factory=dict)
    """By loss, what multiplied its gradient: weights, schedule and whatever found them, all together."""
    floors: dict[str, float] = field(default_factory=dict)
    """By loss that has one, its value where the student equals the teacher, nats."""
    chunk_shares: dict[str, float] = field(default_factory=dict)
    """By loss that joins chunks, how many are left, over how many there were."""
    gradient_shares: dict[str, float] = field(default_factory=dict)
    """By loss, its part in the sum of gradient norms; in the first step of a run alone."""
    phase: str | None = None
    """The stage of the run, where it is not the main one."""
    skipped: Literal["overflow", "untrained", "nonfinite"] | None = None
    """Nothing was updated: a float16 overflow, forward or backward, which halved the loss scale; no token
    that is trained; a loss or gradient that is not finite, where such steps may be skipped."""


def train_step(run: Run, micro_batches: Sequence[Batch]) -> StepReport:
    """Run the optimizer step that is next over this rank's micro-batches.

    The host waits for the device once, for the handful of numbers that decide whether the update may
    happen at all. transformers does in each pass of a body, and what a loss adds docs/losses.md says.

    Raises:
        NonFiniteError: a loss or the gradient norm is not finite; parameters and optimizer are untouched.
        DataError: no token of this step is trained, nor of the `MOST_UNTRAINED` - 1 steps before it.
    """
    stage, device = run.stage, run.world.device
    run.clock.begin(device)
    batches = [batch.to(device) for batch in micro_batches]
    try:
        prepared = prepare(run, batches)
    except NotFiniteError as error:
        raise _teacher_error(run, error) from error
    teacher_flags = deferred.take(device)
    counts = global_counts(prepared, run)
    run.clock.mark("teacher")
    passes = Passes(
        model=run.model,
        objective=stage.objective,
        world=run.world,
        step=run.step - stage.first_step,
        scale=run.loss_scale.factor,
        batches=batches,
        prepared=prepared,
        counts=counts,
        layers=stage.layers,
    )
    is_first = stage is run.main and not passes.step and not run.has_compared
    # of all that is trained: a prefix stage makes gradients that it does not use. Not the module's own
    # zero_grad: after a forward, FSDP2's root shows whole weights, and the shards' would add up over steps
    run.optimizer.zero_grad(set_to_none=True)
    sums = accumulate(passes, with_shares=is_first)
    run.clock.mark("student")
    run.has_compared |= is_first
    grads = list(stage.moving) or trained_parameters(run.model)
    _unscale(grads, run.loss_scale)
    _empty_frozen_rows(stage)
    grad_norm = clip_grad_norm(grads, run.max_grad_norm)
    about = _about_losses(prepared, counts) | {"#trained": _trained_tokens(batches)}
    about |= {"#flags": torch.cat([teacher_flags, deferred.take(device)])}
    report = _report(run, sums, grad_norm, counts, about)
    if report.skipped is None:
        set_learning_rate(stage.optimizer, report.learning_rate)
        stage.optimizer.step()
    run.clock.mark("optimizer")
    return report


def _teacher_error(run: Run, error: Exception) -> NonFiniteError:
    way_out = "use another teacher" if run.is_float32 else "use dtype float32, or another teacher"
    return NonFiniteError(
        f"the teacher cannot be scored at step {run.step}: {error}; nothing was updated; {way_out}"
    )


def _raise_noted(run: Run, flags: Sequence[float]) -> bool:
    """Raise what a GPU found wrong in this step; say whether the student's numbers are not finite.

    On a CPU the operations raise themselves, and a student's loss is NaN where they do.
    """
    alone = run.world.world_size == 1  # else the flags of all ranks were added up
    teacher, student = flags[: deferred.MOST], flags[deferred.MOST :]
    error = deferred.found(teacher, NotFiniteError, with_rows=alone)
    if error is not None:
        raise _teacher_error(run, error)
    deferred.raise_found(teacher, with_rows=alone)
    error = deferred.found(student, NotFiniteError, with_rows=alone)
    if error is None:
        deferred.raise_found(student, with_rows=alone)
    return error is not None


def prepare(run: Run, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Run the teacher's half of every micro-batch of the step that is next."""
    return teacher_halves(run.model, batches, run.add_up, is_prefix=run.stage.is_prefix)


def global_counts(prepared: Sequence[dict[str, Any]], run: Run) -> dict[str, Tensor]:
    """Return, by loss, the count of the whole optimizer step: all micro-batches, all ranks."""
    return step_counts(prepared, run.stage.objective.names, run.add_up)


def _unscale(params: Sequence[Tensor], scale: LossScale) -> None:
    if not scale.enabled:
        return
    for param in params:
        if param.grad is not None:
            param.grad.div_(scale.value)


def _empty_frozen_rows(stage: Stage) -> None:
    """Take the gradient from the rows that stay: they keep their bits."""
    if stage.frozen is None or (gradient := stage.frozen[0].grad) is None:
        return
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    local[stage.frozen[1]] = 0.0


def _trained_tokens(batches: Sequence[Batch]) -> Tensor:
    return torch.stack([batch.student.trained_BT[:, 1:].sum() for batch in batches]).sum()


def _about_losses(prepared: Sequence[dict[str, Any]], counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's part of what losses know before the student runs, for those that say it."""
    found = {}
    for name, first in prepared[0].items():
        if hasattr(first, "used"):
            floor = torch.stack([p[name].floor.double() for p in prepared]).sum(0)
            found[f"floor#{name}"] = (floor / counts[name].clamp_min(1)).mean()
            used_2 = torch.stack([p[name].used for p in prepared]).sum(0)
            found[f"used#{name}"], found[f"chunks#{name}"] = used_2.double().unbind()
    return found


def _report(
    run: Run, sums: Sums, grad_norm: Tensor, counts: dict[str, Tensor], about: dict[str, Tensor]
) -> StepReport:
    """Wait for the device, decide whether the step may be taken, and teach the objective."""
    stage, names = run.stage, run.stage.objective.names
    J, step = len(names), run.step - stage.first_step
    local = {name: sums.mean_J[j].double() for j, name in enumerate(names)}
    added = run.add_up({**local, **about})
    device = run.world.device
    count_J = torch.stack([counts[name].double().mean() for name in names])
    loss_J = torch.stack([added[name] for name in names])
    flags = added.pop("#flags")
    about_A = torch.stack([grad_norm.double().to(device), *(added[name] for name in about if name in added)])
    packed = torch.cat([flags, loss_J, count_J, sums.weight_J, sums.norm_J, about_A]).tolist()
    spoiled, packed = _raise_noted(run, packed[: len(flags)]), packed[len(flags) :]
    values, sizes, weights, norms = (packed[k * J : (k + 1) * J] for k in range(4))
    if spoiled and all(map(math.isfinite, values)):  # a softcap hides an infinity
        values = [math.nan] * J
    losses, norm = dict(zip(names, values, strict=True)), packed[4 * J]
    known = dict(zip((name for name in about if name != "#flags"), packed[4 * J + 1 :], strict=True))
    trained = known["#trained"] if stage is run.main else sum(sizes)
    skipped = whether_skipped(run, losses, norm, trained=trained)
    user = stage.objective.weights(step)
    if skipped is None:
        stage.objective.update(step, values, sizes, norms)
    return StepReport(
        loss=sum(user[name] * losses[name] for name in names),
        losses=losses,
        counts=dict(zip(names, sizes, strict=True)),
        grad_norm=norm,
        learning_rate=stage.learning_rate(step),
        weights=dict(zip(names, weights, strict=True)),
        floors={name: known[f"floor#{name}"] for name in names if f"floor#{name}" in known},
        chunk_shares={
            name: known[f"used#{name}"] / max(1.0, known[f"chunks#{name}"])
            for name in names
            if f"used#{name}" in known
        },
        gradient_shares=sums.shares,
        phase=stage.name,
        skipped=skipped,
    )


def whether_skipped(
    run: Run, losses: dict[str, float], grad_norm: float, *, trained: float
) -> Literal["overflow", "untrained", "nonfinite"] | None:
    """Decide from numbers that all ranks hold alike whether a step may be taken; count those that may not.

    Args:
        run: its loss scale learns from the step.
        losses: of the whole step.
        grad_norm: of the whole step.
        trained: how many tokens of the whole step are trained.

    Raises:
        DataError: too many steps in a row had no trained token.
        NonFiniteError: a loss or the gradient is not finite.
    """
    if not trained:
        run.untrained_steps += 1
        run.untrained_in_a_row += 1
        if run.untrained_in_a_row >= MOST_UNTRAINED:
            raise DataError(
                f"no token was trained in {run.untrained_in_a_row} steps in a row, on any process, step "
                f"{run.step} the last: the answers may lie behind max_length_new, or be masked "
                "(loss_mask_mode), or no row could be read; nothing was updated in them"
            )
        return "untrained"
    run.untrained_in_a_row = 0
    overflow = not all(map(math.isfinite, [grad_norm, *losses.values()]))
    if overflow and not run.loss_scale.enabled and run.nonfinite_steps < run.may_skip:
        run.nonfinite_steps += 1
        return "nonfinite"
    _check_finite(run, losses, grad_norm)
    if run.loss_scale.enabled:
        bad = [f"loss {name}" for name, loss in losses.items() if not math.isfinite(loss)]
        run.loss_scale.update(not overflow, f"{', '.join(bad) or 'the gradient norm'} of step {run.step}")
    return "overflow" if overflow else None


def _check_finite(run: Run, losses: dict[str, float], grad_norm: float) -> None:
    if run.loss_scale.enabled:
        return
    bad = [name for name, loss in losses.items() if not math.isfinite(loss)]
    before = f" ({run.nonfinite_steps} such steps were skipped)" if run.nonfinite_steps else ""
    if bad:
        other = "" if run.is_float32 else ", use dtype float32"
        raise NonFiniteError(
            f"loss {', '.join(bad)} is not finite at step {run.step}{before}: nothing was updated; look at "
            f"the data of this step{other}, or lower the learning rate"
        )
    if not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"the gradient norm is not finite at step {run.step} although every loss is{before}: nothing was "
            f"updated; lower the learning rate{'' if run.is_float32 else ' or use dtype float32'}"
        )
