"""What each loss weighs: Σ_j weight_j(step) · total_j / count_j.

`total_j` is what one micro-batch on one rank adds up; `count_j` is the number of things that the whole
optimizer step adds up, over all ranks and micro-batches. So neither padding, accumulation nor the number
of ranks moves the result.

    weight_j = loss_weights_j · schedule_j(step) · m_j        L_j: the loss of the whole step

    static        m_j = 1
    uncertainty   m_j = e^(−s_j); the scalar is Σ_j w_j (e^(−s_j) L_j + s_j / 2), and s_j is trained too
    balance       m_j = 1 / |L_j|, no gradient through it
    ema           m_j = 1 / |ema_j|, running mean of the L_j of earlier steps; `balance` until there is one
    gradnorm      m_j trained so that losses that lag behind pull harder

The weights that are learned are J floats, found from numbers that all ranks hold alike: every rank takes the
same update in float64 on the host, and a checkpoint holds them as JSON.

Sources: uncertainty, Kendall et al., arXiv:1705.07115, with s = log σ²;
gradnorm, Chen et al., arXiv:1711.02257.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tokenkit.kernels.launch import upload
from tokenkit.objective.aggregation import mixing_matrix
from tokenkit.objective.options import LAST_LAYER, ObjectiveOptions, parse_schedule
from tokenkit.structs import LossTerm

Needs = Literal["nothing", "losses", "last_layer", "gradients"]

SMALLEST_LOSS = 1e-8  # nats; a loss below it is divided by this instead of by itself
SMALLEST_WEIGHT = 1e-3  # of gradnorm, whose weights have a mean of 1: none dies or turns negative
LARGEST_S = 50.0  # of a loss of exactly 0, s falls for ever
UNCERTAINTY_LR = 0.01  # of Adam on s: the weight e^(−s) moves by at most about 1 % per step


class Adam:
    """Adam on a handful of floats, each with its own count of steps; source: arXiv:1412.6980."""

    def __init__(self, size: int, rate: float):
        self.rate = rate
        self.moments = [[0.0, 0.0, 0.0] for _ in range(size)]
        """Per value: first moment, second moment, steps."""

    def step(self, values: list[float], index: int, gradient: float) -> None:
        """Update `values[index]` in place."""
        first, second, steps = self.moments[index]
        first, second, steps = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2, steps + 1
        self.moments[index] = [first, second, steps]
        root = math.sqrt(second / (1 - 0.999**steps))
        values[index] -= self.rate * first / (1 - 0.9**steps) / (root + 1e-8)


class Objective:
    """The weights of the losses, and how they move over the run.

    Args:
        names: the losses, as the user named them.
        weights: one static weight per loss, or a mapping from name to weight (1 where absent).
        schedules: one schedule per loss, or a mapping; it multiplies the static weight.
        total_steps: length of the run, over which the bare schedule names stretch.
        options: weights that move with the losses, and the way gradients are joined.

    Raises:
        ValueError: a weight or schedule for an unknown loss, wrong lengths, a schedule or a function that
            cannot be read, numbers out of range, a combination that undoes itself.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float] | Mapping[str, float] | None,
        schedules: Sequence[str] | Mapping[str, str] | None,
        total_steps: int,
        options: ObjectiveOptions | None = None,
    ):
        self.names = list(names)
        self.options = options or ObjectiveOptions()
        self.parts = self.options.parts
        static = _per_loss("loss_weights", weights, self.names, 1.0)
        moving = _per_loss("loss_schedules", schedules, self.names, "constant")
        start = _per_loss("uncertainty_s_init", _spread(self.options.s_init, self.names), self.names, 0.0)
        self._weights = {name: float(static[name]) for name in self.names}
        self._schedules = {name: parse_schedule(str(moving[name]), total_steps) for name in self.names}
        J = len(self.names)
        self.log_variances = [float(start[name]) for name in self.names]
        """s_j of `uncertainty`."""
        if not all(abs(s) <= LARGEST_S for s in self.log_variances):
            raise ValueError(
                f"uncertainty_s_init must lie in [-{LARGEST_S}, {LARGEST_S}], got {self.log_variances}: "
                "the weight of a loss is e^(-s)"
            )
        self.averages: list[float | None] = [None] * J
        """ema_j of `ema`; None: the loss was never there."""
        self.pulls = [1.0] * J
        """m_j of `gradnorm`; their mean is 1."""
        self.first_losses: list[float | None] = [None] * J
        """L_j of the first step that had one, for `gradnorm`."""
        rate = self.options.gradnorm_lr if self.uses_gradnorm else UNCERTAINTY_LR
        self._adam = Adam(J, rate)

    @property
    def uses_gradnorm(self) -> bool:
        """Whether the weights follow GradNorm."""
        return any(part.name == "gradnorm" for part in self.parts)

    def weights(self, step: int) -> dict[str, float]:
        """Return loss_weights times schedule of each loss at `step` (from 0): what the user set."""
        return {name: self._weights[name] * self._schedules[name](step) for name in self.names}

    def needs(self) -> Needs:
        """Return what of the whole step must be known before the gradient of the step can be formed.

        "nothing": weights stand; "losses": the L_j; "last_layer": inner products of the losses' gradients
        at the last layer; "gradients": those of all parameters, hence one backward pass for each loss.
        """
        if any(part.name in LAST_LAYER for part in self.parts):
            return "last_layer"
        if self.parts:
            return "gradients"
        return "losses" if self.needs_losses() else "nothing"

    def needs_losses(self) -> bool:
        """Whether the weights depend on the losses of this very step."""
        mode = self.options.weight_mode
        return mode == "balance" or (mode == "ema" and None in self.averages)

    def means(self, terms: Mapping[str, LossTerm], counts: Mapping[str, Tensor]) -> list[Tensor]:
        """Return this micro-batch's share of each loss, nats, differentiable.

        Args:
            terms: what this micro-batch on this rank adds up, by loss.
            counts: what the whole optimizer step adds up, by loss. A count of 0 makes the loss 0.
        """
        return [_mean(terms[name].total, counts[name]) for name in self.names]

    def weigh(self, step: int, loss_J: Tensor) -> Tensor:
        """Return [J] float64, the weight of each loss before gradients are joined.

        Args:
            step: the optimizer step, for the schedules.
            loss_J: the losses of the whole step; read with `needs_losses` only. A loss of exactly 0, as
                one without anything to count, weighs nothing where weights divide by it.
        """
        user = list(self.weights(step).values())
        if self.needs_losses():
            size_J = loss_J.detach().double().abs()
            weight_J = _tensor(user, loss_J) * torch.where(size_J > 0, 1 / size_J.clamp_min(SMALLEST_LOSS), 0)
            known = [self._multiplier(j) for j in range(len(user))]
            is_known_J = upload(torch.tensor([m is not None for m in known]), loss_J.device)
            known_J = _tensor([w * (m or 0.0) for w, m in zip(user, known, strict=True)], loss_J)
            return torch.where(is_known_J, known_J, weight_J)
        return _tensor([w * (self._multiplier(j) or 0.0) for j, w in enumerate(user)], loss_J)

    def _multiplier(self, j: int) -> float | None:
        """m_j; None where it depends on the loss of this step."""
        mode, average = self.options.weight_mode, self.averages[j]
        if mode == "uncertainty":
            return math.exp(-self.log_variances[j])
        if mode == "balance" or (mode == "ema" and average is None):
            return None
        if mode == "ema":
            assert average is not None
            return 1 / max(abs(average), SMALLEST_LOSS)
        return self.pulls[j]

    def join(self, weight_J: Tensor, gram_JJ: Tensor, step: int) -> Tensor:
        """Return [J] float64: what multiplies the gradient of each loss, once gradients are joined.

        Args:
            weight_J: from `weigh`.
            gram_JJ: float64, inner products of the losses' gradients over the whole step.
            step: the optimizer step.
        """
        return weight_J @ mixing_matrix(self.parts, gram_JJ, step, weight_J != 0)

    def update(
        self, step: int, losses: Sequence[float], counts: Sequence[float], norms: Sequence[float]
    ) -> None:
        """Learn from a step that was taken. Losses without anything to count teach nothing.

        Args:
            step: the step.
            losses: L_j of the whole step, nats.
            counts: how many things each loss summed over.
            norms: of the losses' gradients at the last layer, before any weight; read by gradnorm alone.
        """
        user = list(self.weights(step).values())
        taught = [j for j in range(len(user)) if counts[j] > 0 and user[j] != 0]
        for j in taught:
            if self.options.weight_mode == "uncertainty":
                gradient = user[j] * (0.5 - math.exp(-self.log_variances[j]) * losses[j])
                self._adam.step(self.log_variances, j, gradient)
                self.log_variances[j] = min(max(self.log_variances[j], -LARGEST_S), LARGEST_S)
            elif self.options.weight_mode == "ema":
                alpha, past = self.options.ema_alpha, self.averages[j]
                self.averages[j] = losses[j] if past is None else alpha * past + (1 - alpha) * losses[j]
        if self.uses_gradnorm:
            self._update_gradnorm([j for j in taught if losses[j] > 0], losses, norms)

    def _update_gradnorm(self, taught: list[int], losses: Sequence[float], norms: Sequence[float]) -> None:
        """Equations 1 and 2 of the paper: d/dm_j Σ |m_j n_j − mean(m n) r_j^α|, the target held fixed."""
        if not taught:
            return
        for j in taught:
            self.first_losses[j] = self.first_losses[j] or losses[j]
        progress = {j: losses[j] / (self.first_losses[j] or losses[j]) for j in taught}
        slowest = sum(progress.values()) / len(taught)
        strengths = {j: self.pulls[j] * norms[j] for j in taught}
        mean = sum(strengths.values()) / len(taught)
        for j in taught:
            target = mean * (progress[j] / slowest) ** self.options.gradnorm_alpha
            sign = (strengths[j] > target) - (strengths[j] < target)
            self._adam.step(self.pulls, j, sign * norms[j])
        kept = [max(pull, SMALLEST_WEIGHT) for pull in self.pulls]
        self.pulls = [pull * len(kept) / sum(kept) for pull in kept]

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, as JSON that reads back to the same bits."""
        return {
            "log_variances": list(self.log_variances),
            "averages": list(self.averages),
            "pulls": list(self.pulls),
            "first_losses": list(self.first_losses),
            "moments": [list(moment) for moment in self._adam.moments],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: it is of another number of losses.
        """
        sizes = {len(values) for values in state.values()}
        if sizes != {len(self.names)}:
            raise ValueError(
                f"the weights of a checkpoint must be of {len(self.names)} losses {self.names}, got those "
                f"of {sorted(sizes)}: use the configuration that it was saved with"
            )
        self.log_variances = list(state["log_variances"])
        self.averages = list(state["averages"])
        self.pulls = list(state["pulls"])
        self.first_losses = list(state["first_losses"])
        self._adam.moments = [list(moment) for moment in state["moments"]]


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """Divide; where a loss comes in several parts (chunk sizes), it is the mean of their quotients."""
    return (total / count.clamp_min(1).to(total.dtype)).mean()


def _tensor(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(torch.tensor(values, dtype=torch.float64), like.device)


def _spread(given: float | Sequence[float] | Mapping[str, float], names: list[str]) -> object:
    """Return one value for all losses as a list."""
    if isinstance(given, int | float):
        return [given] * len(names)
    return [given[0]] * len(names) if isinstance(given, Sequence) and len(given) == 1 else given


def _per_loss(field: str, given: object, names: list[str], default: Any) -> dict[str, Any]:
    if given is None or (isinstance(given, Sequence) and not given):
        return dict.fromkeys(names, default)
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"{field} names {unknown}, but the losses of this run are {names}")
        return {name: given.get(name, default) for name in names}
    assert isinstance(given, Sequence)
    if len(given) != len(names):
        raise ValueError(f"{field} must give one value per loss {names}, got {list(given)}")
    return dict(zip(names, given, strict=True))
