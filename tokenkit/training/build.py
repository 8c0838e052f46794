"""From a configuration to everything that a run needs, cheap checks first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from tokenkit.config import TrainConfig
from tokenkit.config.models import ModelSource
from tokenkit.data.batches import Batches
from tokenkit.data.collate import AlignedCollator, size_of
from tokenkit.data.mix import open_data, read_documents
from tokenkit.data.options import SourceOptions
from tokenkit.data.packing import PackedRows
from tokenkit.embeddings.projector import build_projector
from tokenkit.embeddings.rows import new_tokens
from tokenkit.embeddings.transfer import transfer_vocabulary
from tokenkit.errors import ConfigError, blaming_data
from tokenkit.evaluation.bits_per_byte import HeldoutBatch, heldout_batches
from tokenkit.export.huggingface import rehearse
from tokenkit.kernels.head.tiles import default_workspace
from tokenkit.losses import Loss, make_loss
from tokenkit.losses.latents import Latents
from tokenkit.models import blocks
from tokenkit.models.causal_lm import (
    DTYPES,
    CausalLM,
    LoadOptions,
    Vocabulary,
    effective_weight,
    load_causal_lm,
)
from tokenkit.models.check import check_packing
from tokenkit.models.expansion import InputExpansion
from tokenkit.models.expert_tables import cut_tables
from tokenkit.models.float8 import use_float8
from tokenkit.models.lora import make_trainable
from tokenkit.models.new import new_causal_lm
from tokenkit.models.precision import compute_in
from tokenkit.models.reading import model_fingerprint
from tokenkit.objective.weights import Objective
from tokenkit.optim import LearningRate, build_optimizer
from tokenkit.parallel import World, shard
from tokenkit.tokenization.expansion import expansion_tables
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.tokenization.written import ids_by_bytes
from tokenkit.training.distillation import Distillation
from tokenkit.training.pair import Pair, Tokenizers, load_tokenizers
from tokenkit.training.prefix_stage import build_prefix_stage, prefix_options
from tokenkit.training.step import LossScale, Run, Stage


@dataclass(frozen=True, slots=True)
class Parts:
    """A run, ready to train."""

    run: Run
    student: CausalLM
    tokenizers: Tokenizers
    batches: Batches
    collator: AlignedCollator
    heldout: list[HeldoutBatch]
    fingerprints: dict[str, str]
    """Digests of tokenizers and models, by what each is of the run."""
    transfer: dict[str, int]
    """How many embedding rows were made in which way; empty where the tokenizer stays."""
    was_tied: bool
    """The student came with one matrix for input and output."""


class Models(NamedTuple):
    """What is loaded."""

    student: CausalLM
    teacher: CausalLM | Vocabulary | None
    """None: nothing reads one."""
    transfer: dict[str, int]
    """How many embedding rows were made in which way."""
    was_tied: bool


def build(config: TrainConfig, world: World) -> Parts:
    """Load and connect everything. Nothing is written.

    Raises:
        ValueError, FileNotFoundError: one line that says what is wrong, before any step was taken.
    """
    prefix_steps = config.training.prefix.prefix_steps
    main_steps = config.schedule.steps - prefix_steps
    objective = Objective(
        config.objective.losses,
        config.objective.static_weights,
        config.objective.loss_schedules,
        main_steps,
        config.objective.weighing,
    )
    tokenizers = load_tokenizers(config)
    paths = (config.objective.mined_mapping_path, config.objective.tokenizer_pair_data_path)
    pair = Pair(tokenizers.target, tokenizers.teacher, world.device, *paths)
    losses = build_losses(config, pair)
    collator = build_collator(config, pair, losses)
    with blaming_data():
        mix, documents = open_data(config.data, config.run.seed)
        if config.evaluation.ppl_eval_data is not None:
            documents = read_documents(SourceOptions(path=config.evaluation.ppl_eval_data))
    packed = PackedRows(mix, collator, config.text.max_length_student) if config.schedule.pack else None
    batches = Batches(
        packed or mix,
        packed or collator,
        config.schedule.batch_size,
        accumulation=config.schedule.gradient_accumulation_steps,
        rank=world.rank,
        world=world.world_size,
        prefetch=config.data.num_workers,
        size_of=size_of if config.text.group_by_length else None,
    )
    heldout = heldout_batches(documents, collator, config.evaluation.eval_batch_size) if documents else []

    needs_teacher = reads_teacher(config, losses, measures=bool(heldout))
    student, teacher, transfer, was_tied = build_models(config, tokenizers, needs_teacher=needs_teacher)
    check_rows(config, student, teacher, config.schedule.batch_size // world.world_size)
    prefix = prefix_options(config, student, teacher) if config.training.prefix.n_prefix_layers else None
    model = Distillation(student, teacher, losses, prefix=prefix)
    _prepare_bodies(model, config, world)
    _place(model, world, config)
    run = Run(
        model=model,
        stages=_stages(config, model, objective, tokenizers, world),
        world=world,
        max_grad_norm=config.optimizer.max_grad_norm or None,
        is_float32=config.training.dtype == "float32",
        loss_scale=LossScale(enabled=config.training.dtype == "float16"),
        may_skip=config.schedule.skip_nonfinite,
    )
    fingerprints = tokenizers.fingerprints | _model_fingerprints(config, student, teacher)
    return Parts(run, student, tokenizers, batches, collator, heldout, fingerprints, transfer, was_tied)


def check_rows(
    config: TrainConfig, student: CausalLM, teacher: CausalLM | Vocabulary | None, share: int
) -> None:
    """See that documents of one row do not see each other, where rows hold several; see `check_packing`.

    `share`: documents of one step and process.
    """
    rows = share // config.schedule.gradient_accumulation_steps
    if config.schedule.pack:
        check_packing(student, rows)
    if config.text.pack_documents:
        for model in (student, teacher):
            if isinstance(model, CausalLM):  # held-out documents are laid out like that, too
                check_packing(model, max(rows, config.evaluation.eval_batch_size), "pack_documents")


def reads_teacher(config: TrainConfig, losses: Mapping[str, Loss[Any]], *, measures: bool) -> bool:
    """Whether anything reads a teacher; `measures`: bits per byte are, of a named one too."""
    if config.training.prefix.prefix_steps > 0 or any(loss.needs_teacher for loss in losses.values()):
        return True
    return config.teacher is not None and measures


def _model_fingerprints(
    config: TrainConfig, student: CausalLM, teacher: CausalLM | Vocabulary | None
) -> dict[str, str]:
    sources: dict[str, tuple[ModelSource, CausalLM]] = {"student model": (config.student, student)}
    if config.teacher is not None and isinstance(teacher, CausalLM):
        sources["teacher model"] = (config.teacher, teacher)
    return {
        name: model_fingerprint(
            source.pretrained_model_name_or_path, getattr(model.config, "_commit_hash", None)
        )
        for name, (source, model) in sources.items()
    }


def _stages(
    config: TrainConfig, model: Distillation, objective: Objective, tokenizers: Tokenizers, world: World
) -> tuple[Stage, ...]:
    """Return what is trained when, after sharding."""
    options, prefix = config.optimizer, config.training.prefix
    experts = getattr(model.student.config, "peer_config", None)
    main = Stage(
        objective=objective,
        optimizer=build_optimizer(model.named_parameters(), options, experts),
        learning_rate=LearningRate(
            options, config.schedule.steps - prefix.prefix_steps, config.schedule.warmup_steps
        ),
        first_step=prefix.prefix_steps,
    )
    if not prefix.prefix_steps:
        return (main,)
    is_new_V = None
    if prefix.prefix_trainable == "non_overlapping_embeddings":
        is_new_V = torch.from_numpy(new_tokens(tokenizers.old, tokenizers.target))
    options = dataclasses.replace(options, learning_rate=prefix.prefix_lr)
    moves_layers = prefix.prefix_trainable == "all"
    first = build_prefix_stage(
        model, options, prefix.prefix_steps, is_new_V, world, moves_layers=moves_layers
    )
    return first, main


def build_losses(config: TrainConfig, pair: Pair) -> dict[str, Loss[Any]]:
    """Return the losses by the names that the user gave; ValueError where what they read does not fit."""
    mib = config.training.loss_workspace_mib
    workspace_bytes = default_workspace(pair.device) if mib is None else mib * 2**20
    losses = {}
    for name in config.objective.losses:
        options = config.objective.options.of(name)
        if "workspace_bytes" in options:
            options["workspace_bytes"] = workspace_bytes
        losses[name] = make_loss(name, pair, **options)
    return losses


def build_collator(config: TrainConfig, pair: Pair, losses: Mapping[str, Loss[Any]]) -> AlignedCollator:
    """Return the collator that makes the chunks which the losses ask for."""
    asked = {kind for loss in losses.values() if (kind := loss.chunks) is not None}
    if config.training.prefix.prefix_steps:
        asked.add(Latents(config.objective.options.latents).chunks)
    kinds = sorted(asked)
    unbiased = None
    if "unbiased" in kinds:
        unbiased = pair.biases.rule(config.objective.options.alm.space_threshold)
    return AlignedCollator(
        pair.student,
        None if config.schedule.pack else pair.teacher,
        chunk_kinds=kinds,
        unbiased=unbiased,
        unencodable=config.data.bad_rows.unencodable,
        **vars(config.text),
    )


def build_models(config: TrainConfig, tokenizers: Tokenizers, *, needs_teacher: bool = True) -> Models:
    """Load student and teacher, and move the student to its new vocabulary.

    A student that keeps its body (adapters, or embeddings alone) is its own teacher under its old
    vocabulary. One that is trained whole gets a frozen copy beside it, if `needs_teacher`: a second body is
    loaded only where something reads it.
    """
    mode, compute = config.training.train_model_mode, DTYPES[config.training.dtype]
    student = _load(config, config.student, tokenizers.old, torch.float32 if mode == "full" else compute)
    teacher: CausalLM | Vocabulary | None
    if not needs_teacher and (config.teacher is not None or mode == "full"):
        teacher = None
    elif config.teacher is not None:
        teacher = _load(config, config.teacher, tokenizers.teacher, compute)
    elif mode == "full":
        teacher = _load(config, config.student, tokenizers.old, compute)
    else:
        teacher = student.vocabulary()
    was_tied = student.is_tied
    old = [] if not config.training.has_hypernet else _old_rows(config, student, teacher)
    if config.target.expand_input_ids:
        if student.layer_table is not None:
            raise ConfigError(
                "expand_input_ids adds old embeddings to those of bytes, and every layer of this model has "
                "rows of its own that would stay behind: leave it out"
            )
        tables = expansion_tables(ids_by_bytes(tokenizers.old))
        old_WD = student.embedding.weight[: tokenizers.old.vocab_size]
        student.expansion = InputExpansion(student.embedding, tables, old_WD)
    output_mode, report = config.training.output_embeddings_mode, {}
    if tokenizers.target is not tokenizers.old or output_mode == "untie":
        report = transfer_vocabulary(
            student,
            tokenizers.old,
            tokenizers.target,
            pad_to_multiple_of=config.target.pad_to_multiple_of,
            output_embeddings=output_mode,
        )
    rehearse(student, tokenizers.target)
    _check_lengths(config, student, teacher)
    make_trainable(
        student,
        mode,
        config.training.lora,
        train_embeddings=config.training.train_embeddings,
        recomputes=config.training.gradient_checkpointing,
    )
    if config.training.hypernet is not None and old:
        student.projector = build_projector(
            config.training.hypernet, student, old, tokenizers.old, tokenizers.target
        )
    if config.training.products.float8 != "none":
        use_float8(student, config.training.products.float8)
    return Models(student, teacher, report, was_tied)


def _old_rows(
    config: TrainConfig, student: CausalLM, teacher: CausalLM | Vocabulary | None
) -> list[nn.Parameter]:
    """Return the rows that a hypernetwork reads, before the student gets new ones."""
    if config.teacher is not None or teacher is None:
        return [nn.Parameter(m.detach().clone(), requires_grad=False) for m in student.matrices()]
    shared: list[Any] = [effective_weight(teacher.embedding), effective_weight(teacher.output)]
    return [m.requires_grad_(False) for m in shared[: 1 if student.is_tied else 2]]  # one copy for both


def _load(config: TrainConfig, source: ModelSource, tokenizer: Tokenizer, dtype: torch.dtype) -> CausalLM:
    options = LoadOptions(
        revision=source.revision,
        dtype=dtype,
        attn_implementation=config.training.attention,
        trust_remote_code=config.run.trust_remote_code,
    )
    if source.new_model is not None:
        name = source.pretrained_model_name_or_path
        return new_causal_lm(name, source.new_model, tokenizer.vocab_size, options)
    with blaming_data():
        return load_causal_lm(source.pretrained_model_name_or_path, tokenizer.vocab_size, options)


def _check_lengths(config: TrainConfig, student: CausalLM, teacher: CausalLM | Vocabulary | None) -> None:
    asked = {"max_length_new": (config.text.max_length_student, student)}
    if teacher is not None:
        body = student if isinstance(teacher, Vocabulary) else teacher
        asked["max_length_teacher"] = (config.text.max_length_teacher, body)
    for name, (length, model) in asked.items():
        check_length(name, length, model.config)


def check_length(name: str, length: int, model_config: Any) -> None:
    """Refuse documents that a model has no positions for.

    Args:
        name: of the field that says how long they are.
        length: what it says, tokens.
        model_config: of transformers.

    Raises:
        ValueError: the model has fewer positions.
    """
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(
            f"{name} is {length}, but the model has {limit} positions: set {name} to at most {limit}"
        )


def _prepare_bodies(model: Distillation, config: TrainConfig, world: World) -> None:
    if config.training.body.compile and "qkv" in model.collect:
        raise ConfigError(
            "compile hides what lies inside a layer, and latents_to_align qkv reads it there: set compile to "
            "false, or latents_to_align to last_hidden_state or all_hidden_states"
        )
    for body in (model.student, model.teacher):
        if isinstance(body, CausalLM):
            blocks.prepare(body, config.training.body, world.device)


def _place(model: Distillation, world: World, config: TrainConfig) -> None:
    """Move the module to its device, in pieces where it is sharded; let it compute in the run's type."""
    model.train()
    compute = DTYPES[config.training.dtype]
    layers = list(model.student.layers)
    if isinstance(model.teacher, CausalLM):
        layers += model.teacher.layers
    if world.mesh is not None:
        tables = cut_tables(model, world.mesh)
        how = config.parallel
        groups: list[nn.Module] = [model.student]
        if model.teacher is not None and how.teacher_sharding == "sharded":
            groups.append(model.teacher)
            if model.student.projector is not None:  # it reads rows that are the teacher's too: one group
                groups = []
        elif model.teacher is not None:
            layers, whole = list(model.student.layers), model.teacher.to(world.device)
            for parameter in whole.parameters():  # not the buffers: positions turn by angles in float32
                parameter.data = parameter.data.to(compute)
            tables = [*tables, *whole.parameters()]
        shard(
            model,
            layers,
            world,
            param_dtype=None if compute is torch.float32 else compute,
            reshard_after_forward=how.reshard_after_forward,
            kept=tables,
            groups=groups,
        )
        return
    model.to(world.device)
    if compute is not torch.float32:
        compute_in(model, layers, compute)
