"""The optimizer, and the learning rate as a pure function of the step: there is no scheduler to restore."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Optimizer

from tokenkit.optim_options import SCHEDULES, OptimizerOptions, ParamGroup


def learning_rate(step: int, options: OptimizerOptions, total_steps: int, warmup_steps: int = 0) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Warm-up: peak · (step + 1) / warmup_steps, so that no step is spent at rate 0 and the last one of
    the warm-up runs at the peak. Decay: peak · (r + (1 − r) · f(progress)), r = `lr_min_ratio`,
    progress = (step − warmup_steps) / (total_steps − warmup_steps), f(x) = 1 − x (linear) or
    (1 + cos πx) / 2 (cosine). From `total_steps` on the rate stays at its minimum.
    """
    if step < 0 or total_steps < 1 or warmup_steps < 0:
        raise ValueError(
            "step and warmup_steps must be at least 0 and total_steps at least 1: "
            f"got {step}, {warmup_steps} and {total_steps}"
        )
    warms_up, shape = SCHEDULES[options.schedule_name]
    peak = options.learning_rate
    if not warms_up:
        return peak
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    left = 1 - progress if shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (options.lr_min_ratio + (1 - options.lr_min_ratio) * left)


@dataclass(frozen=True, slots=True)
class LearningRate:
    """`learning_rate` of one run: a function of the step alone."""

    options: OptimizerOptions
    total_steps: int
    warmup_steps: int = 0

    def __call__(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        return learning_rate(step, self.options, self.total_steps, self.warmup_steps)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every group `rate` times its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


TABLES = (".experts.down", ".experts.up", "shared_experts.down", "shared_experts.up")
"""Ends of the names of the tables of PEER layers, [experts, neurons, hidden size]."""
ROWWISE = ("rowwise_adam", "rowwise_adagrad")


class RowwiseAdamW(AdamW):
    """AdamW in which groups with `rowwise` keep one second moment for each row: one number for an expert.

    rowwise_adam: m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂) mean(g²), θ ← θ − η m̂ / (√v̂ + ε), with corrected
    moments. rowwise_adagrad: v ← v + mean(g²), θ ← θ − η g / (√v + ε), and no first moment. The mean is over
    a row. Sources: Duchi et al. 2011; the row-wise optimizers of embedding tables (FBGEMM).
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all groups, each in its way."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("rowwise")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("rowwise"):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _update_rows(parameter, parameter.grad, self.state[parameter], group)
        return loss


def _update_rows(parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    inner = tuple(range(1, grad.ndim))
    square = _whole_rows(grad.float().square().mean(inner, keepdim=True))
    keeps_first = group["rowwise"] == "rowwise_adam"
    if not state:
        state["step"] = torch.zeros(())
        state["row_sq"] = torch.zeros_like(square)
        if keeps_first:
            state["exp_avg"] = torch.zeros_like(parameter)
    state["step"] += 1
    beta1, beta2 = group["betas"]
    if not keeps_first:
        state["row_sq"] += square
        parameter -= group["lr"] * grad / (state["row_sq"].sqrt() + group["eps"])
        return
    step = float(state["step"])
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["row_sq"].lerp_(square, 1 - beta2)
    scale = (state["row_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
    parameter -= group["lr"] / (1 - beta1**step) * state["exp_avg"] / scale


def _whole_rows(mean: Tensor) -> Tensor:
    """Return the means of rows that are cut over ranks as every rank needs them: of all columns."""
    if not isinstance(mean, DTensor):
        return mean
    return mean.redistribute(placements=[Replicate() if p.is_partial() else p for p in mean.placements])


def is_table(name: str) -> bool:
    """Whether a parameter is a table of a PEER layer's experts."""
    return name.endswith(TABLES)


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    options: OptimizerOptions,
    experts: Mapping[str, Any] | None = None,
) -> Optimizer:
    """Return AdamW over the trainable ones of `named_parameters` (after sharding, not before).

    Each group carries a `name`: "student", or "parts" for what losses train beside it (parameters whose
    names begin with `parts.`).

    Args:
        named_parameters: of the whole module.
        options: of all of them.
        experts: `peer_config` of a model that has PEER layers: `optimizer` of their tables, which are never
            decayed row-wise, and `expert_lr`, the peak of their rate.

    Matrices and embeddings are decayed; parameters of one dimension (norms, biases) never are. Every
    form of the update works element by element: the same inputs give the same bits.

    Raises:
        ValueError: nothing is trainable, or a group's pattern matches no trainable parameter.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "no parameter is trainable: set train_model_mode to full or lora, or train_embeddings to true"
        )
    for group in options.param_groups:
        if not any(re.search(group.pattern, name) for name, _ in trainable):
            raise ValueError(
                f"optimizer.param_groups: {group.pattern!r} matches none of the {len(trainable)} trainable "
                f"parameters, whose names look like {trainable[0][0]!r}: correct it or remove it"
            )
    rowwise, expert_lr = (experts or {}).get("optimizer"), (experts or {}).get("expert_lr")
    by_kind: dict[tuple[str, float, bool, str | None], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        lr_scale, how = _lr_scale(name, options.param_groups), None
        if is_table(name):
            lr_scale *= expert_lr / options.learning_rate if expert_lr else 1.0
            how = rowwise if rowwise in ROWWISE else None
        kind = (_group_name(name), lr_scale, parameter.ndim > 1 and how is None, how)
        by_kind.setdefault(kind, []).append(parameter)
    fused = options.use_fused_adam and all(p.device.type in ("cpu", "cuda") for _, p in trainable)
    groups = [
        {
            "name": group_name,
            "params": parameters,
            "lr_scale": lr_scale,
            "weight_decay": options.weight_decay if is_decayed else 0.0,
            **({} if how is None else {"rowwise": how}),
        }
        for (group_name, lr_scale, is_decayed, how), parameters in by_kind.items()
    ]
    kind_of_all = RowwiseAdamW if any(how for *_, how in by_kind) else AdamW
    return kind_of_all(
        groups,
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        fused=fused,
        # over lists of tensors on a CPU is slower than one tensor after the other
        foreach=not fused and trainable[0][1].is_cuda,
    )


def _group_name(name: str) -> str:
    """What a parameter belongs to: the student, or the trained parts of losses."""
    return "parts" if name.startswith("parts.") else "student"


def _lr_scale(name: str, groups: tuple[ParamGroup, ...]) -> float:
    return next((group.lr_scale for group in groups if re.search(group.pattern, name)), 1.0)
