"""A training counted from configurations alone: the models as tensors without memory.

They go through the changes that training makes (another vocabulary, adapters, dtypes) on the meta device, and
run forward once as fake tensors: what autograd keeps is counted tensor by tensor. FLOPs are 2 x parameters a
token forward, 2 more for the gradients of what is below, and 2 for those of weights.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tokenkit.config import TrainConfig
from tokenkit.config.models import ModelSource
from tokenkit.errors import blaming_data
from tokenkit.evaluation.parameters import count_parameters
from tokenkit.kernels.head.tiles import default_workspace
from tokenkit.models.causal_lm import DTYPES, CausalLM, LoadOptions
from tokenkit.models.lora import make_trainable
from tokenkit.models.new import new_model
from tokenkit.models.precision import compute_in
from tokenkit.models.reading import blank_model
from tokenkit.optim import ROWWISE, is_table
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer
from tokenkit.training.expert_costs import cut_tables_of

HEAD_PASSES = 4
"""Products of all hidden states with a head that a loss makes for a step: one forward, three backward."""


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that one process holds of a whole model from step to step, beside activations."""

    weights: int
    """As they are kept."""
    gradients: int
    """float32, of what is trained."""
    optimizer: int
    tables: int
    """Of `weights`, those of experts."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def held(model: nn.Module, experts: Mapping[str, Any] | None = None) -> Held:
    """Return what the training of a model holds, by AdamW; a model on the meta device is enough.

    Args:
        model: shared parameters count once.
        experts: its `peer_config`, whose `optimizer` is that of the tables.
    """
    named = list(model.named_parameters())
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    how = (experts or {}).get("optimizer")
    return Held(
        weights=_size(parameter for _, parameter in named),
        gradients=sum(4 * parameter.numel() for _, parameter in trained),
        optimizer=sum(_moments(name, parameter, how) for name, parameter in trained),
        tables=_size(parameter for name, parameter in named if is_table(name)),
    )


def _moments(name: str, parameter: Tensor, how: str | None) -> int:
    """Return what the optimizer keeps, float32: two moments; of tables of experts what was chosen."""
    size = 4 * parameter.numel()
    if how not in ROWWISE or not is_table(name):
        return 2 * size
    return (size if how == "rowwise_adam" else 0) + 4 * len(parameter)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A training as its configuration says, of one rank that shares nothing. Bytes, unless said otherwise."""

    weights: int
    """Of the student, as they are kept."""
    trained: int
    """Numbers that are trained."""
    gradients: int
    tables: int
    """Of `gradients`, those of tables of experts that are cut over ranks, which are never whole."""
    optimizer: int
    teacher: int
    """0: the student's body serves, or nothing reads one."""
    teacher_vocabulary: int
    """Of the old vocabulary beside the student, where its body serves."""
    layer: int
    """Of the largest layer, gathered, in the type that computes."""
    layers: int
    """Of all layers of the student, so."""
    teacher_layers: int
    vocabularies: int
    """Of all that is in no layer, both models', so."""
    activations: int
    recomputed: int
    """Of one layer that is computed again in the backward pass; 0 without gradient_checkpointing."""
    losses: int
    embedding_gradient: int
    """That of the input embedding, made whole before it is added to the head's."""
    body_flops: float
    """Of one micro-batch, student and teacher."""
    head_flops: float
    student_tokens: int
    """Of one micro-batch, at most."""
    micro_batches: int
    """Of one rank, a step."""
    exchanged: float
    """What one rank receives for its experts in a micro-batch, where their tables are cut."""


def count(config: TrainConfig, ranks: int) -> Counted:
    """Make the models of nothing and count them; see `estimate`."""
    training, schedule = config.training, config.schedule
    per_step = ranks * schedule.gradient_accumulation_steps
    if schedule.batch_size % per_step:
        raise ValueError(
            f"batch_size ({schedule.batch_size}) must be a multiple of {per_step}, which is "
            f"{schedule.gradient_accumulation_steps} micro-batches on each of {ranks} processes"
        )
    documents, dtype = schedule.batch_size // per_step, DTYPES[training.dtype]
    with torch.device("meta"), _quiet():
        student = _made(config, config.student, torch.float32 if _is_full(config) else dtype)
        old_vocabulary = _size(p for m in student.vocabulary_modules for p in m.parameters())
        teacher, rows = _teacher(config), _rows(config, student)
        active = _active(student), None if teacher is None else _active(teacher)
        _move(student, config, rows)
        width = student.embedding.weight.shape[1]
        shape = documents, config.text.max_length_student
        tokens, teacher_tokens = documents * shape[1], documents * config.text.max_length_teacher
        peer = getattr(student.config, "peer_config", None)
        kept_whole, cut = held(student, peer), cut_tables_of(student, peer, ranks, tokens, dtype.itemsize)
        layers = [_size(_gathered(layer, is_cut=cut.numbers > 0), dtype) for layer in student.layers]
        outside = _size(_gathered(student, is_cut=cut.numbers > 0), dtype) - sum(layers)
        theirs = list(teacher.parameters()) if teacher is not None else []
        their_layers = _size((p for m in teacher.layers for p in m.parameters()), dtype) if teacher else 0
        shares_body = config.teacher is None and not _is_full(config) and config.objective.needs_teacher
        head, trains_head = rows * width, training.train_embeddings
        num_losses = len(config.objective.losses)
        losses = num_losses * 2 * 4 * tokens * width + _workspace_bytes(training.loss_workspace_mib)
        if trains_head:
            losses += 4 * head * min(2, num_losses)
        theirs_head = rows * width if teacher is None else teacher.output.weight.numel()
        kept, recomputed = _activations(student, config, shape, dtype, is_sharded=ranks > 1)
        bodies, heads = _flops(active, tokens, teacher_tokens, head, theirs_head, config)
        return Counted(
            weights=kept_whole.weights,
            trained=kept_whole.gradients // 4,
            gradients=kept_whole.gradients,
            tables=4 * cut.numbers,
            optimizer=kept_whole.optimizer,
            teacher=_size(theirs),
            teacher_vocabulary=old_vocabulary if shares_body else 0,
            layer=max(layers),
            layers=sum(layers),
            teacher_layers=their_layers,
            vocabularies=outside
            + _size(theirs, dtype)
            - their_layers
            + (old_vocabulary if shares_body else 0),
            activations=kept + cut.kept,
            recomputed=recomputed,
            losses=losses,
            embedding_gradient=4 * head if trains_head else 0,
            body_flops=bodies,
            head_flops=heads,
            student_tokens=tokens,
            micro_batches=schedule.gradient_accumulation_steps,
            exchanged=cut.received,
        )


def _gathered(module: nn.Module, *, is_cut: bool) -> Iterator[nn.Parameter]:
    """Yield the parameters that FSDP2 gathers: all but tables that are cut by columns."""
    for name, parameter in module.named_parameters(prefix="module"):
        if not (is_cut and is_table(name)):
            yield parameter


def _is_full(config: TrainConfig) -> bool:
    return config.training.train_model_mode == "full"


def _rows(config: TrainConfig, student: CausalLM) -> int:
    """Return the rows of the student's new vocabulary."""
    target = config.target
    rows = student.vocab_size + len(target.tokens_to_add)
    if target.target_tokenizer_name is not None:
        rows = _tokenizer(config, target.target_tokenizer_name, target.tokens_to_add).vocab_size
    multiple = target.pad_to_multiple_of
    return -(-rows // multiple) * multiple


def _tokenizer(config: TrainConfig, name: str, tokens_to_add: tuple[str, ...] = ()) -> Tokenizer:
    with blaming_data():
        return load_tokenizer(
            name, tokens_to_add=tokens_to_add, trust_remote_code=config.run.trust_remote_code
        )


def _workspace_bytes(mib: int | None) -> int:
    """Return what a loss may take; where the device decides, that of this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return default_workspace(device) if mib is None else mib * 2**20


def _made(config: TrainConfig, source: ModelSource, dtype: torch.dtype) -> CausalLM:
    """Return a model of its configuration, on the device "meta"."""
    if source.new_model is not None:
        assert source.tokenizer_name is not None
        ids = _tokenizer(config, source.tokenizer_name).vocab_size
        with torch.device("meta"):
            model = new_model(source.new_model, ids, dtype=dtype, attn_implementation="sdpa")
    else:
        options = LoadOptions(revision=source.revision, trust_remote_code=config.run.trust_remote_code)
        with blaming_data():
            model = blank_model(source.pretrained_model_name_or_path, options, dtype)
    return CausalLM(model, model.config.vocab_size)


def _move(student: CausalLM, config: TrainConfig, rows: int) -> None:
    """Give the student what training gives it: another vocabulary, adapters, float32 where it trains."""
    training = config.training
    was_tied = student.is_tied and training.output_embeddings_mode != "untie"
    own = student.embedding.weight
    embedding_VD = torch.empty(rows, own.shape[1], dtype=own.dtype)
    student.replace_vocabulary(embedding_VD, None if was_tied else torch.empty_like(embedding_VD), None, rows)
    make_trainable(
        student,
        training.train_model_mode,
        training.lora,
        train_embeddings=training.train_embeddings,
        recomputes=training.gradient_checkpointing,
    )


def _teacher(config: TrainConfig) -> CausalLM | None:
    """Return the second body that is loaded, if one is."""
    dtype = DTYPES[config.training.dtype]
    if config.teacher is not None:
        return _made(config, config.teacher, dtype)
    if _is_full(config) and config.objective.needs_teacher:
        return _made(config, config.student, dtype)
    return None


def _activations(
    student: CausalLM, config: TrainConfig, shape: tuple[int, int], dtype: torch.dtype, *, is_sharded: bool
) -> tuple[int, int]:
    """Return the bytes that autograd keeps of a forward, and those of one layer that is computed again."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    student.train()
    if dtype is not torch.float32:
        if is_sharded:
            student.to(dtype)  # FSDP2 computes with what it gathers
        else:
            compute_in(student, student.layers, dtype)
    body = student.causal_lm
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def kept() -> int:
        with torch.device("cpu"), mode, saved(student.parameters()) as sizes:
            student(torch.zeros(shape, dtype=torch.int64))
        return sum(sizes.values())

    with mode:
        student.to_empty(device="cpu")

    if not config.training.gradient_checkpointing:
        return kept(), 0
    inputs = kept()
    body.gradient_checkpointing_disable()
    return inputs, max(0, kept() - inputs) // len(student.layers)


@contextlib.contextmanager
def saved(parameters: Iterable[nn.Parameter]) -> Iterator[dict[int, int]]:
    """Collect the size of each storage that autograd keeps and that is no parameter's."""
    own = {p.untyped_storage()._cdata for p in parameters}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # else another tensor would get its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def _active(model: CausalLM) -> int:
    """Return the parameters of the layers that one token meets."""
    return sum(layer["active"] for layer in count_parameters(model.causal_lm)["layers"])


def _flops(
    active: tuple[int, int | None],
    tokens: int,
    teacher_tokens: int,
    head: int,
    teacher_head: int,
    config: TrainConfig,
) -> tuple[float, float]:
    """Return the FLOPs of both bodies, and those of the heads, for a micro-batch."""
    body, teacher = active
    forwards = 1 + config.training.gradient_checkpointing
    passes = 2 * forwards + 2 + (2 if _is_full(config) else 0)
    bodies = float(passes * body * tokens)
    heads = float(2 * HEAD_PASSES * len(config.objective.losses) * head * tokens)
    if config.objective.needs_teacher:
        bodies += 2.0 * (body if teacher is None else teacher) * teacher_tokens
        heads += 2.0 * teacher_head * teacher_tokens
    return bodies, heads


def _size(parameters: Any, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of parameters, each once, as they are or in another type."""
    unique = {id(p): p for p in parameters}.values()
    return sum(p.numel() * (p.element_size() if dtype is None else dtype.itemsize) for p in unique)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
