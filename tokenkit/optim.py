"""The optimizer, and the learning rate as a pure function of the step: there is no scheduler to restore."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
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


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], options: OptimizerOptions
) -> Optimizer:
    """Return AdamW over the trainable ones of `named_parameters` (after sharding, not before).

    Each group carries a `name`: "student", or "parts" for what losses train beside it (parameters whose
    names begin with `parts.`).

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
    by_kind: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        kind = (_group_name(name), _lr_scale(name, options.param_groups), parameter.ndim > 1)
        by_kind.setdefault(kind, []).append(parameter)
    fused = options.use_fused_adam and all(p.device.type in ("cpu", "cuda") for _, p in trainable)
    groups = [
        {
            "name": group_name,
            "params": parameters,
            "lr_scale": lr_scale,
            "weight_decay": options.weight_decay if is_decayed else 0.0,
        }
        for (group_name, lr_scale, is_decayed), parameters in by_kind.items()
    ]
    return AdamW(
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
