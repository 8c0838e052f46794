"""A hypernetwork between the rows that are trained and the rows that a model uses, inside distillation.

    row(t) = own(t) + alpha * scale * network(old rows of the pieces of t)      with `residual`

own(t) are the student's embeddings, begun by FVT and trained where `train_embeddings` says so; the old rows
stand still. The network moves tokens of like spelling together, also those that the data never shows. It runs
in every forward of the student; an export holds what it wrote last, and no network.

Source of the network: Minixhofer et al., "Zero-Shot Tokenizer Transfer", 2024 (arXiv:2405.07883).
Dimensions: V new vocabulary, padding included; W old vocabulary; D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tokenkit.embeddings.hypernet import Hypernet, Surfaces, surfaces
from tokenkit.embeddings.hypernet_options import HypernetOptions
from tokenkit.embeddings.rows import row_sources

if TYPE_CHECKING:
    from tokenkit.models.causal_lm import CausalLM
    from tokenkit.tokenization.tokenizer import Tokenizer


class EmbeddingProjector(nn.Module):
    """Trained rows in, the rows that a model uses out.

    Args:
        network: what is trained; it writes as many matrices as the model has.
        surfaces: of the new tokens, with as many rows as the model's matrices.
        old: [at least W, D], the rows that the network reads, frozen; they may be another module's too.

    The state is the network's; surfaces are made from both tokenizers, whose fingerprints a checkpoint holds.
    """

    def __init__(self, network: Hypernet, surfaces: Surfaces, old: Sequence[nn.Parameter]):
        super().__init__()
        self.network, self._count_L = network, surfaces.count_L
        self.old = nn.ParameterList(old)
        for field in dataclasses.fields(surfaces):
            if isinstance(value := getattr(surfaces, field.name), Tensor):
                self.register_buffer(field.name, value, persistent=False)

    def forward(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Return the rows [V, D] that stand for `own`: input embedding, and head where it is not tied."""
        tensors = dict(self.named_buffers(recurse=False))
        found = Surfaces(**tensors, count_L=self._count_L)
        rows: list[Tensor] = self.network(found, list(self.old), own)
        return rows


def build_projector(
    options: HypernetOptions,
    student: CausalLM,
    old_matrices: Sequence[nn.Parameter],
    old: Tokenizer,
    new: Tokenizer,
) -> EmbeddingProjector:
    """Return a projector for a student that has its new rows already.

    Args:
        options: not `identity`.
        student: its matrices are the network's base.
        old_matrices: frozen, the rows for `old`: one matrix of a tied model, otherwise input and output.
        old: the tokenizer of these rows.
        new: the tokenizer of the student.

    Raises:
        ValueError: widths that do not fit, or an adapter in the place of the embeddings.
    """
    for module in (student.embedding, student.output):
        if "weight" not in module._parameters:
            raise ValueError(
                "a hypernetwork writes the embeddings, and here an adapter stands in for them: leave them "
                "out of model_lora_targets and model_lora_modules_to_save, or set hypernet.architecture to "
                "identity"
            )
    rows = [matrix[: old.vocab_size] for matrix in old_matrices]
    width, own = rows[0].shape[1], student.matrices()
    network = Hypernet(options, width, reads=len(rows), writes=len(own)).fit_scale(rows)
    found = surfaces(row_sources(old, new), network.max_pieces, len(own[0]))
    return EmbeddingProjector(network, found, old_matrices)
