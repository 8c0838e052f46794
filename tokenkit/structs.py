"""What passes between the stages. Torch alone is imported: other trainers pull this in with the losses.

    text -> Tokens (one per tokenizer) -> Batch (two Sides, Chunks) -> HiddenStates (+ Head) -> LossTerm

Dimensions: B documents, T student positions, S teacher positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from tokenkit.options import ChunkKind as ChunkKind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn
    from torch.distributed import ProcessGroup

NO_LABEL = -100  # what PyTorch's and transformers' losses pass over
UNPAIRED = -1  # `Tokens.byte_ends` of a special token that the other tokenizer cannot write


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenization of one document, laid along the axis that both tokenizations share.

    The axis is the document's UTF-8 bytes in order, plus one unit for each template piece (BOS, the
    start of a turn, a role, ...) that both tokenizers can write. A token spans from the end before it
    to its own end; a token of no width (SentencePiece's lone dummy prefix, all but the last token of
    a template piece) belongs to the chunk that follows it.
    """

    ids: NDArray[np.int32]
    """[n] token ids."""
    byte_ends: NDArray[np.int64]
    """[n] position on the axis just past each token, never falling; UNPAIRED: no partner exists."""
    special: NDArray[np.bool_]
    """[n] the token was written by a template, not by text."""
    trained: NDArray[np.bool_]
    """[n] the loss mask: this token may be a target."""


@dataclass(frozen=True, slots=True)
class Packed:
    """The documents of one side in fewer, fuller rows, as a model reads them (`data.lockstep`)."""

    ids_RP: Tensor
    """int64."""
    position_RP: Tensor
    """int64, from 0 on in each document, and in the padding behind the last."""
    place_BT: Tensor
    """int64, where each token of each document lies among the R x P; any place where there is no token."""

    def map(self, move: Callable[[Tensor], Tensor]) -> Packed:
        """Return the same rows with `move` applied to each tensor."""
        return Packed(move(self.ids_RP), move(self.position_RP), move(self.place_BT))

    def unpack(self, states_RPD: Tensor) -> Tensor:
        """Return [B, T, D], the states of each document in a row of its own."""
        B, T = self.place_BT.shape
        return states_RPD.flatten(0, 1).index_select(0, self.place_BT.flatten()).view(B, T, -1)


@dataclass(frozen=True, slots=True)
class Side:
    """One tokenization of a batch's documents, padded on the right."""

    ids_BT: Tensor
    """int64; padding holds any id inside the vocabulary."""
    length_B: Tensor
    """int64, tokens of each document, padding left out."""
    trained_BT: Tensor
    """bool, the loss mask; False at padding."""
    space_V: Tensor | None = None
    """bool, tokens that `space_mask_mode` counts as beginning with whitespace."""
    eos_id: int | None = None
    position_BT: Tensor | None = None
    """int64, the position of each token in its document, where rows hold several (`data.packing`); None: a
    row is a document."""
    ids_mean: str | None = None
    """`Tokenizer.meaning` of the ids; None: nobody said."""
    packed: Packed | None = None
    """How a model reads these documents where not row by row; everything else does."""

    @property
    def num_positions(self) -> int:
        """Positions that a model computes, padding included; known without a wait."""
        return (self.ids_BT if self.packed is None else self.packed.ids_RP).numel()

    def map(self, move: Callable[[Tensor], Tensor]) -> Side:
        """Return the same side with `move` applied to each tensor."""
        return replace(
            self,
            ids_BT=move(self.ids_BT),
            length_B=move(self.length_B),
            trained_BT=move(self.trained_BT),
            space_V=None if self.space_V is None else move(self.space_V),
            position_BT=None if self.position_BT is None else move(self.position_BT),
            packed=None if self.packed is None else self.packed.map(move),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return what varies from batch to batch, named and shaped as Hugging Face models take it."""
        T = self.ids_BT.shape[1]
        is_token_BT = torch.arange(T, device=self.ids_BT.device) < self.length_B[:, None]
        return {
            "input_ids": self.ids_BT,
            "attention_mask": is_token_BT.long(),
            "labels": self.ids_BT.where(self.trained_BT, NO_LABEL),
        }


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunk of each token, int32; -1: in none (padding, no partner, text that does not align).

    Ids grow from left to right within a row and need not be consecutive.
    """

    student_BT: Tensor
    teacher_BS: Tensor

    def map(self, move: Callable[[Tensor], Tensor]) -> Chunks:
        """Return the same chunks with `move` applied to each tensor."""
        return Chunks(move(self.student_BT), move(self.teacher_BS))


@dataclass(frozen=True, slots=True, repr=False)
class Batch:
    """The same documents in two tokenizations, and which tokens say the same thing.

    `dict(batch)` holds what varies from batch to batch as flat tensors [B, ...], which is what other
    trainers can move, slice and gather; `from_tensors` is the way back.
    """

    student: Side
    teacher: Side
    chunks: dict[str, Chunks]
    """By `ChunkKind`."""
    host: Batch | None = field(default=None, init=False, compare=False)
    """Of a batch that `to` put on a device: what it was made of, whose numbers are read without a wait."""

    def __repr__(self) -> str:
        (B, T), S = self.student.ids_BT.shape, self.teacher.ids_BT.shape[1]
        kinds = ", ".join(self.chunks) or "no"
        return f"Batch({B} rows, {T} student and {S} teacher positions, {kinds} chunks)"

    def map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """Return the same batch with `move` applied to each tensor."""
        chunks = {kind: chunks.map(move) for kind, chunks in self.chunks.items()}
        return Batch(self.student.map(move), self.teacher.map(move), chunks)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Return the same batch with its tensors on `device`."""
        comes_from_host = self.student.ids_BT.device.type == "cpu"
        # what is not pinned is copied when the device has nothing left to do
        pins = comes_from_host and non_blocking and torch.device(device).type == "cuda"
        batch = self.pin_memory() if pins else self
        moved = batch.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if comes_from_host:
            object.__setattr__(moved, "host", self)
        return moved

    @property
    def on_host(self) -> Batch:
        """The same batch on the CPU, where it came from there: what sizes are counted on. Else this one."""
        return self if self.host is None else self.host

    def pin_memory(self) -> Batch:
        """Return the same batch in memory that a GPU can fetch by itself; a `DataLoader` calls this."""
        return self.map(Tensor.pin_memory)

    def tensors(self) -> dict[str, Tensor]:
        """Return what varies from batch to batch: both sides' tensors, and the chunks of each kind."""
        teacher = {f"teacher_{name}": tensor for name, tensor in self.teacher.tensors().items()}
        found = {**self.student.tensors(), **teacher}
        for kind, chunks in self.chunks.items():
            found[f"chunks_{kind}"] = chunks.student_BT
            found[f"teacher_chunks_{kind}"] = chunks.teacher_BS
        return found

    def keys(self) -> list[str]:
        """Return the names of `tensors()`: with `[]` this is all that `dict(batch)` and `**batch` need."""
        return list(self.tensors())

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors()[name]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], like: Batch) -> Batch:
        """Return the batch of what `tensors()` gave, moved, sliced or gathered since.

        Args:
            tensors: further entries are passed over.
            like: a batch of the same collator: what does not vary is taken from it.

        Raises:
            KeyError: an entry is missing.
        """
        device = tensors["input_ids"].device
        sides = []
        for prefix, side in (("", like.student), ("teacher_", like.teacher)):
            sides.append(
                Side(
                    ids_BT=tensors[f"{prefix}input_ids"],
                    length_B=tensors[f"{prefix}attention_mask"].sum(1),
                    trained_BT=tensors[f"{prefix}labels"] != NO_LABEL,
                    space_V=None if side.space_V is None else side.space_V.to(device, non_blocking=True),
                    eos_id=side.eos_id,
                )
            )
        chunks = {
            kind: Chunks(tensors[f"chunks_{kind}"], tensors[f"teacher_chunks_{kind}"]) for kind in like.chunks
        }
        return cls(sides[0], sides[1], chunks)


@dataclass(frozen=True, slots=True)
class Shard:
    """Where a head's rows lie that this process holds, when the vocabulary is divided over processes."""

    group: ProcessGroup
    """The processes that hold one head together, each a stretch of its rows; all see the same tokens."""
    start: int
    """Id of the first row here."""


@dataclass(frozen=True, slots=True)
class Head:
    """`logits = softcap(scale * (hidden @ weight.T + bias))`, `softcap(z) = c tanh(z / c)`."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocab_size: int | None = None
    """Ids from here on are padding: they take no probability. None: every row is a token."""
    shard: Shard | None = None
    """Where the vocabulary is divided over processes: weight and bias are this one's rows, which may be
    none, and `vocab_size`, that of the whole head, must be given."""

    def __post_init__(self) -> None:
        if not isinstance(self.weight_VD, Tensor):
            raise TypeError(
                f"a Head holds the matrix [V, D] itself: got {type(self.weight_VD).__name__}; of a linear "
                "layer write Head(layer.weight, layer.bias), of a Hugging Face model take "
                "tokenkit.integrations.hidden_states, which knows its scale and softcap too"
            )


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Where a model stops: the states that its head would multiply, and that head.

    The other fields are filled where a loss asks for them (`StateKind`).
    """

    hidden_BTD: Tensor
    head: Head
    embedded_BTD: Tensor | None = None
    """The input embeddings of the tokens."""
    layers_BTD: tuple[Tensor, ...] = ()
    """What each layer gives to the next; of the last layer `hidden_BTD`."""
    qkv: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()
    """Of each layer, [B, T, ·] queries, keys and values as their projections give them: before rotation
    and before norms of single heads."""
    spoiled: Tensor | None = None
    """float32 scalar, 0, or NaN where a state of a real token is not finite. Whoever makes it has put 0 in
    place of such states, and adds it to every total."""

    def map(self, move: Callable[[Tensor], Tensor]) -> HiddenStates:
        """Return the same states with `move` applied to each tensor [B, T, ·]."""
        return replace(
            self,
            hidden_BTD=move(self.hidden_BTD),
            embedded_BTD=None if self.embedded_BTD is None else move(self.embedded_BTD),
            layers_BTD=tuple(map(move, self.layers_BTD)),
            qkv=tuple((move(q), move(k), move(v)) for q, k, v in self.qkv),
        )


StateKind = Literal["embedded", "layers", "qkv"]
"""What a model may be asked for beside its last hidden states."""


@dataclass(frozen=True, slots=True)
class Widths:
    """Sizes of a model, of which a loss may have to know both models'."""

    hidden: int
    embedding: int
    layers: int
    qkv: tuple[int, int, int] | None = None
    """Of queries, keys and values; None: this architecture's are not known."""


class Scores(NamedTuple):
    """What a head says, in its place; 0 where it was not asked."""

    logp_BT: Tensor
    """log p of each token that was named."""
    mass_BT: Tensor | None
    """log P(the next token is in the subset) at each position."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a loss may use beside hidden states and a batch, read anew in each half of a step.

    Under FSDP2 a weight must be read in the forward that uses it: what the teacher's half read may lie in
    storage that is free again when the student's half runs.
    """

    teacher_head: Head | None = None
    student_head: Head | None = None
    """In the teacher's half. Where a hypernetwork writes the student's rows, the head holds them only if a
    loss asked for "embedded"; otherwise its shape alone is the student's."""
    student_embedded_BTD: Tensor | None = None
    """The student's input embeddings, in the teacher's half, where a loss asked for "embedded"."""
    modules: nn.Module | None = None
    """The loss's own trained parts."""
    scores: Scores | None = None
    """What this half's head says of what the loss requested; None: the loss asks the head itself."""


NO_CONTEXT = Context()


class LossTerm(NamedTuple):
    """A loss before its division. Sums add up over ranks and micro-batches; means do not."""

    total: Tensor
    """float32, nats, differentiable: a scalar, or [K] where the loss is the mean of K such quotients."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count; FSDP2 finds tensors in tuples only
    """How many things `total` sums over, of its shape."""

    @property
    def mean(self) -> Tensor:
        """`total / count`, float32 scalar: the loss of this batch alone. 0 where nothing was compared.

        Over micro-batches and ranks, add up totals and counts and divide once: means of means are another
        objective.
        """
        return (self.total / self.count.clamp_min(1)).mean()
