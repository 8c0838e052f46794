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

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenkit.config import TrainConfig
from tokenkit.losses.latents import Latents
from tokenkit.models.causal_lm import CausalLM, Vocabulary, effective_weight
from tokenkit.objective.weights import Objective
from tokenkit.optim import LearningRate, build_optimizer
from tokenkit.optim_options import OptimizerOptions
from tokenkit.parallel import World
from tokenkit.training.distillation import Distillation, PrefixOptions
from tokenkit.training.requests import PREFIX
from tokenkit.training.step import Run, Stage


def prefix_options(
    config: TrainConfig, student: CausalLM, teacher: CausalLM | Vocabulary | None
) -> PrefixOptions:
    """Return what the stage runs and compares.

    Raises:
        ValueError: a model has fewer layers, or the widths differ.
    """
    n_layers = config.training.prefix.n_prefix_layers
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
) -> Stage:
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
    return Stage(
        name=PREFIX,
        objective=Objective([PREFIX], None, None, steps),
        optimizer=build_optimizer([("embedding", weight), *layers.items()], own),
        learning_rate=LearningRate(own, steps),
        moving=(weight, *layers.values()),
        frozen=None if frozen_V is None else (weight, frozen_V),
        layers=tuple(model.prefix_layers),
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


def take_over(run: Run) -> None:
    """Give the stage the moments that a checkpoint of it held.

    A checkpoint is read before its step is known, into the main optimizer, which holds the embedding too.
    """
    if run.stage is not run.main:
        for parameter in list(run.optimizer.state):
            run.stage.optimizer.state[parameter] = run.optimizer.state.pop(parameter)
