"""What passes between the stages. Torch alone is imported: other trainers pull this in with the losses.

    text -> Tokens (one per tokenizer) -> Batch (two Sides, Chunks) -> HiddenStates (+ Head) -> LossTerm

Dimensions: B documents, T student positions, S teacher positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn
    from torch.distributed import ProcessGroup

UNPAIRED = -1  # `Tokens.byte_ends` of a special token that the other tokenizer cannot write

ChunkKind = Literal["unconstrained", "space", "unbiased"]


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

    def to(self, device: torch.device | str) -> Side:
        """Return the same side with its tensors on `device`."""
        return replace(
            self,
            ids_BT=self.ids_BT.to(device, non_blocking=True),
            length_B=self.length_B.to(device, non_blocking=True),
            trained_BT=self.trained_BT.to(device, non_blocking=True),
            space_V=None if self.space_V is None else self.space_V.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunk of each token, int32; -1: in none (padding, no partner, text that does not align).

    Ids grow from left to right within a row and need not be consecutive.
    """

    student_BT: Tensor
    teacher_BS: Tensor

    def to(self, device: torch.device | str) -> Chunks:
        """Return the same chunks on `device`."""
        return Chunks(
            self.student_BT.to(device, non_blocking=True),
            self.teacher_BS.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """The same documents in two tokenizations, and which tokens say the same thing."""

    student: Side
    teacher: Side
    chunks: dict[str, Chunks]
    """By `ChunkKind`."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch with its tensors on `device`."""
        chunks = {kind: chunks.to(device) for kind, chunks in self.chunks.items()}
        return Batch(self.student.to(device), self.teacher.to(device), chunks)


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


NO_CONTEXT = Context()


class LossTerm(NamedTuple):
    """A loss before its division. Sums add up over ranks and micro-batches; means do not."""

    total: Tensor
    """float32, nats, differentiable: a scalar, or [K] where the loss is the mean of K such quotients."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count; FSDP2 finds tensors in tuples only
    """How many things `total` sums over, of its shape."""
