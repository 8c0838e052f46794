"""The first steps of a run, in which new embeddings learn to be read by the first layers.

For `prefix_steps` steps student and teacher run only their embedding and their first `n_prefix_layers`
layers, and the hidden states behind them are drawn together at the last tokens of aligned chunks: the
loss of `losses/latents.py`, which needs no head. Only embedding rows move, at a rate that falls linearly
from `prefix_lr` to 0; with `non_overlapping_embeddings` only those of tokens that the old vocabulary does
not have, with `all` also what is trained in these layers. Nothing is decayed, so a row that gets no gradient
keeps its bits.

The main stage then begins with an optimizer and a schedule of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tokenkit.config import TrainConfig
from tokenkit.losses.latents import Latents
from tokenkit.models.causal_lm import CausalLM, Vocabulary, effective_weight
from tokenkit.optim import LearningRate, build_optimizer, set_learning_rate
from tokenkit.optim_options import OptimizerOptions
from tokenkit.parallel import World, all_reduce_counts, clip_grad_norm, set_gradient_sync
from tokenkit.structs import Batch
from tokenkit.training.distillation import Distillation, PrefixOptions
from tokenkit.training.step import Run, StepReport, train_step, whether_skipped

NAME = "prefix"
"""Of its loss and its phase in metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class PrefixStage:
    """What the first stage changes, and how."""

    steps: int
    optimizer: Optimizer
    """Of what moves."""
    learning_rate: LearningRate
    embedding_VD: nn.Parameter
    """The student's; this rank's shard where it is sharded."""
    frozen_V: Tensor | None
    """bool, true for the rows here that stay as they are. None: all move."""
    layers: tuple[nn.Parameter, ...] = ()
    """What moves in the first layers."""


def prefix_options(
    config: TrainConfig, student: CausalLM, teacher: CausalLM | Vocabulary | None
) -> PrefixOptions | None:
    """Return what the stage runs and compares; None where there is no such stage.

    Raises:
        ValueError: a model has fewer layers, or the widths differ.
    """
    n_layers = config.training.prefix.n_prefix_layers
    if not n_layers:
        return None
    body = student if teacher is None or isinstance(teacher, Vocabulary) else teacher
    layers, widths = [len(m.layers) for m in (student, body)], [m.widths().hidden for m in (student, body)]
    if n_layers > min(layers):
        raise ValueError(
            f"n_prefix_layers is {n_layers}, but the student has {layers[0]} layers and the teacher "
            f"{layers[1]}: set it to at most {min(layers)}"
        )
    if widths[0] != widths[1]:
        raise ValueError(
            f"a prefix stage compares hidden states one to one, but the student's are {widths[0]} wide and "
            f"the teacher's {widths[1]}: name the student's own model as teacher, or set prefix_steps and "
            "n_prefix_layers to 0"
        )
    options = replace(config.objective.options.latents, align="last_hidden_state", project=False)
    return PrefixOptions(n_layers, Latents(options))


def build_prefix_stage(
    model: Distillation,
    options: OptimizerOptions,
    steps: int,
    is_new_V: Tensor | None,
    world: World,
    *,
    moves_layers: bool = False,
) -> PrefixStage:
    """Return the stage, after sharding.

    Args:
        model: holds the embedding, which must be trained in the main stage too.
        options: of the main optimizer; `learning_rate` is the stage's own.
        steps: length of the stage.
        is_new_V: bool, the ids whose rows move; None: all rows do.
        world: rows are cut over its processes as FSDP2 cuts them.
        moves_layers: what is trained in the stage's layers moves too.

    Raises:
        ValueError: no row would move, the embedding is not trained as a matrix of its own, or nothing is
            trained in layers that shall move.
    """
    weight: Any = effective_weight(model.student.embedding)
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        raise ValueError(
            "prefix_steps trains the student's input embedding, and here an adapter stands in for it: set "
            "train_embeddings to true and leave the embedding out of model_lora_targets"
        )
    frozen_V = None
    if is_new_V is not None:
        if not bool(is_new_V.any()):
            raise ValueError(
                "prefix_trainable is non_overlapping_embeddings, and every token of the target tokenizer has "
                "its row in the old vocabulary: set prefix_steps and n_prefix_layers to 0, or "
                "prefix_trainable to embeddings"
            )
        frozen_V = torch.ones(weight.shape[0], dtype=torch.bool)  # padding rows stay, too
        frozen_V[: len(is_new_V)] = ~is_new_V
        frozen_V = _local_rows(frozen_V, weight, world).to(world.device)
    own = replace(
        options,
        weight_decay=0.0,
        param_groups=(),
        schedule="linear",
        lr_scheduler_type=None,
        lr_min_ratio=0.0,
    )
    layers = _trained_layers(model) if moves_layers else {}
    return PrefixStage(
        steps=steps,
        optimizer=build_optimizer([("embedding", weight), *layers.items()], own),
        learning_rate=LearningRate(own, steps),
        embedding_VD=weight,
        frozen_V=frozen_V,
        layers=tuple(layers.values()),
    )


def _trained_layers(model: Distillation) -> dict[str, nn.Parameter]:
    """Return what is trained in the layers that the stage runs, by name."""
    layers = nn.ModuleList(model.prefix_layers)
    trained = {name: parameter for name, parameter in layers.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError(
            f"prefix_trainable is all, and nothing is trained in the first {len(layers)} layers: set it to "
            "embeddings, or let model_lora_layers, model_lora_targets or model_lora_target_regex name them"
        )
    return trained


def _local_rows(values_V: Tensor, weight: Tensor, world: World) -> Tensor:
    """Return the entries of the rows that this rank holds: FSDP2 cuts rows as `torch.chunk` does."""
    if not isinstance(weight, DTensor):
        return values_V
    pieces = values_V.chunk(world.world_size)
    mine = pieces[world.rank] if world.rank < len(pieces) else values_V[:0]
    assert len(mine) == len(weight.to_local()), "the rows of this rank are others than thought"
    return mine


def take_step(run: Run, stage: PrefixStage | None, micro_batches: Sequence[Batch]) -> StepReport:
    """Run the step that is next: one of the first stage while it lasts, else one of the main stage."""
    if in_stage(run, stage):
        assert stage is not None
        return prefix_step(run, stage, micro_batches)
    return train_step(run, micro_batches)


def in_stage(run: Run, stage: PrefixStage | None) -> bool:
    """Whether the next step belongs to the first stage."""
    return stage is not None and run.step < stage.steps


def current_optimizer(run: Run, stage: PrefixStage | None) -> Optimizer:
    """Return the optimizer whose moments the next step needs."""
    return stage.optimizer if stage is not None and in_stage(run, stage) else run.optimizer


def take_over(run: Run, stage: PrefixStage | None) -> None:
    """Give the stage the moments that a checkpoint of it held.

    A checkpoint is read before its step is known, into the main optimizer, which holds the embedding too.
    """
    if stage is not None and in_stage(run, stage):
        for parameter in list(run.optimizer.state):
            stage.optimizer.state[parameter] = run.optimizer.state.pop(parameter)


def prefix_step(run: Run, stage: PrefixStage, micro_batches: Sequence[Batch]) -> StepReport:
    """Run one optimizer step of the first stage over this rank's micro-batches.

    Raises:
        NonFiniteError: the loss or the gradient norm is not finite; nothing was updated.
        DataError: as `train_step`, where there is nothing to compare.
    """
    batches = [batch.to(run.world.device) for batch in micro_batches]
    model: Any = run.model
    measured = [model(batch, "prefix_teacher") for batch in batches]
    local = torch.stack([m.sum_K for m in measured]).sum(0)
    sum_K = all_reduce_counts({NAME: local}, run.step, run.world)[NAME]
    count = sum_K[0]

    # of the layers too: their gradients are made and not used. Not the module's own zero_grad: after a
    # forward, FSDP2's root shows whole weights, and the shards' gradients would add up over steps
    run.optimizer.zero_grad(set_to_none=True)
    scale = run.loss_scale
    total = torch.zeros((), device=run.world.device)
    for index, batch in enumerate(batches):
        set_gradient_sync(run.model, index == len(batches) - 1, layers=model.prefix_layers)
        term = model(batch, "prefix", (measured[index], sum_K))
        mean = term.total / count.to(term.total.dtype).clamp(min=1)
        (mean * scale.factor).backward()
        total += mean.detach()
    grad_norm = _prepare_gradient(stage, run)
    loss = all_reduce_counts({NAME: total}, run.step, run.world)[NAME].item()
    norm = grad_norm.item()
    skipped = whether_skipped(run, {NAME: loss}, norm, trained=count.item())
    rate = stage.learning_rate(run.step)
    if skipped is None:
        set_learning_rate(stage.optimizer, rate)
        stage.optimizer.step()
    return StepReport(
        loss=loss,
        losses={NAME: loss},
        counts={NAME: count.item()},
        grad_norm=norm,
        learning_rate=rate,
        skipped=skipped,
        phase=NAME,
    )


def _prepare_gradient(stage: PrefixStage, run: Run) -> Tensor:
    """Unscale the gradients, empty the rows that stay, clip; return the norm before clipping."""
    moving = [stage.embedding_VD, *stage.layers]
    for parameter in moving:
        if (gradient := parameter.grad) is None:
            continue
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if run.loss_scale.enabled:
            local.div_(run.loss_scale.value)
        if stage.frozen_V is not None and parameter is stage.embedding_VD:
            local[stage.frozen_V] = 0.0
    return clip_grad_norm(moving, run.max_grad_norm)
