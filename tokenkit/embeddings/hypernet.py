"""A network that writes embedding rows for new tokens from the old rows of their pieces.

    base(t)  = mean of the old rows of the pieces of t        (what FVT would write)
    row(t)   = base(t) + alpha * scale * network(pieces of t)   with `residual`
    row(t)   = scale * network(pieces of t)                     without

`scale` is the standard deviation of the old matrix. With `residual` the last projection begins at 0: before
training the rows are FVT's, bit for bit. Every architecture ends in a projection of three vectors per token,
the mean, the first and the last of its pieces: a head wants to know how a token begins, a body what it
ended with.

    linear       that projection alone, of the old rows themselves
    mlp          `num_layers` feed-forward blocks of width D between
    transformer  `num_layers` blocks over the pieces of a token, each attention and feed-forward

Special tokens, and tokens with nothing to write them with, keep FVT's row.

Source: Minixhofer et al., "Zero-Shot Tokenizer Transfer", 2024 (arXiv:2405.07883), section 3.
Dimensions: V new tokens, W old tokens, D hidden size, L pieces that the network reads of a token, I old
matrices that it reads, O matrices that it writes, U tokens of one slab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from tokenkit.embeddings.rows import LABELS, RowSources

Architecture = Literal["identity", "linear", "mlp", "transformer"]
MAX_PIECES = 16  # a token of more pieces than this is rare; its base is the mean of all of them
SLAB = 16_384  # tokens: activations of one slab at a time


@dataclass(frozen=True, kw_only=True)
class HypernetOptions:
    """The shape of a hypernetwork; the fields of `hypernet.` in a configuration, by the same names."""

    architecture: Architecture = "transformer"
    num_layers: int = 1
    num_heads: int = 8
    residual: bool = True
    residual_alpha: float = 1.0
    use_attention: bool = True
    use_attention_mask: bool = True
    shared: bool = True

    def __post_init__(self) -> None:
        """Check what does not depend on the model."""
        if self.num_layers < 1:
            raise ValueError(f"hypernet.num_layers must be at least 1, got {self.num_layers}")
        if self.num_heads < 1:
            raise ValueError(f"hypernet.num_heads must be at least 1, got {self.num_heads}")


@dataclass(frozen=True, slots=True)
class Surfaces:
    """How the old tokenizer writes each new token."""

    old_ids_K: Tensor
    """int64, the pieces of all tokens, one token after the other."""
    offset_V: Tensor
    """int64, where each token begins in `old_ids_K`."""
    pieces_VL: Tensor
    """int64, the first L pieces of each token; 0 behind its end."""
    length_V: Tensor
    """int64, how many of `pieces_VL` are there."""
    is_read_V: Tensor
    """bool, whether the network writes this row: ordinary tokens that have pieces."""
    has_no_source_V: Tensor
    """bool, rows that are the mean of all old rows."""

    def to(self, device: torch.device) -> Surfaces:
        """Return the same surfaces on `device`."""
        return Surfaces(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def surfaces(sources: RowSources, max_pieces: int = MAX_PIECES) -> Surfaces:
    """Lay out the pieces of every token as a matrix."""
    count, offset_V = len(sources.offset_V), sources.offset_V
    end_V = torch.cat([offset_V[1:], torch.tensor([len(sources.old_ids_K)])])
    length_V = (end_V - offset_V).clamp(max=max_pieces)
    step_L = torch.arange(max_pieces)
    is_piece_VL = step_L < length_V[:, None]
    pieces_VL = torch.zeros(count, max_pieces, dtype=torch.int64)
    pieces_VL[is_piece_VL] = sources.old_ids_K[(offset_V[:, None] + step_L)[is_piece_VL]]
    method_V = torch.from_numpy(sources.method_V)
    is_special_V = method_V == LABELS.index("special")
    return Surfaces(
        sources.old_ids_K,
        offset_V,
        pieces_VL,
        length_V,
        (length_V > 0) & ~is_special_V,
        method_V == LABELS.index("mean_of_all"),
    )


def mean_rows(surfaces: Surfaces, old_WD: Tensor) -> Tensor:
    """Return FVT's rows [V, D]; differentiable in `old_WD`."""
    means_VD = embedding_bag(surfaces.old_ids_K, old_WD, surfaces.offset_V, mode="mean")
    mean_D = (old_WD.sum(0, dtype=torch.float64) / len(old_WD)).to(old_WD.dtype)  # as FVT sums it
    return torch.where(surfaces.has_no_source_V[:, None], mean_D, means_VD)


class Hypernet(nn.Module):
    """Old rows and surfaces in, new rows out.

    Args:
        options: its shape.
        width: D, the width of the embeddings.
        reads: I, how many old matrices it reads: 1 for a tied model, 2 otherwise (input, output).
        writes: O, how many matrices it writes.
        max_pieces: L.

    Raises:
        ValueError: heads that do not divide the width.
    """

    scale_I: Tensor

    def __init__(
        self,
        options: HypernetOptions,
        width: int,
        *,
        reads: int = 1,
        writes: int = 1,
        max_pieces: int = MAX_PIECES,
    ):
        super().__init__()
        if options.architecture == "transformer" and options.use_attention and width % options.num_heads:
            raise ValueError(
                f"hypernet.num_heads must divide the embeddings' width, {width}: got {options.num_heads}"
            )
        self.options, self.width, self.reads, self.writes = options, width, reads, writes
        self.max_pieces = max_pieces
        self.register_buffer("scale_I", torch.ones(reads))
        networks = [] if options.architecture == "identity" else [writes] if options.shared else [1] * writes
        self.networks = nn.ModuleList(_Network(options, width, reads, outs, max_pieces) for outs in networks)

    @torch.no_grad()
    def fit_scale(self, old: Sequence[Tensor]) -> Hypernet:
        """Take the scale of the rows that will be read and written; part of the state."""
        self.check(old)
        self.scale_I.copy_(torch.stack([matrix.detach().float().std() for matrix in old]))
        return self

    def forward(self, surfaces: Surfaces, old: Sequence[Tensor]) -> list[Tensor]:
        """Return O matrices of new rows, [V, D], in the dtype of the old ones; differentiable in them.

        Args:
            surfaces: of the new tokens, with `max_pieces` of this network.
            old: I matrices [W, D].

        Raises:
            ValueError: matrices of another width or number.
        """
        self.check(old)
        which = [min(index, self.reads - 1) for index in range(self.writes)]
        means = [mean_rows(surfaces, matrix) for matrix in old]
        if self.options.architecture == "identity":
            return [means[index] for index in which]
        written_VOD = self._written(surfaces, old)
        is_read_V1 = surfaces.is_read_V[:, None]
        rows = []
        for index, source in enumerate(which):
            delta_VD = self.scale_I[source] * written_VOD[:, index]
            if self.options.residual:
                changed_VD = means[source] + self.options.residual_alpha * delta_VD
            else:
                changed_VD = delta_VD.to(means[source].dtype)
            rows.append(torch.where(is_read_V1, changed_VD, means[source]))
        return rows

    def _written(self, surfaces: Surfaces, old: Sequence[Tensor]) -> Tensor:
        """Run the networks, a slab of tokens at a time; activations of a slab are computed again backward."""
        scaled_WE = torch.cat([m / s for m, s in zip(old, self.scale_I.unbind(), strict=True)], dim=1)
        slabs = []
        for start in range(0, len(surfaces.length_V), SLAB):
            pieces_UL = surfaces.pieces_VL[start : start + SLAB]
            length_U = surfaces.length_V[start : start + SLAB]
            if torch.is_grad_enabled() and len(surfaces.length_V) > SLAB:
                slab = checkpoint(self._slab, scaled_WE, pieces_UL, length_U, use_reentrant=False)
            else:
                slab = self._slab(scaled_WE, pieces_UL, length_U)
            slabs.append(slab)
        return torch.cat(slabs).unflatten(1, (self.writes, self.width))

    def _slab(self, scaled_WE: Tensor, pieces_UL: Tensor, length_U: Tensor) -> Tensor:
        rows_ULE = scaled_WE[pieces_UL]
        return torch.cat([network(rows_ULE, length_U) for network in self.networks], dim=1)

    def check(self, old: Sequence[Tensor]) -> None:
        """Refuse matrices that this network cannot read.

        Raises:
            ValueError: another number or width.
        """
        widths = [matrix.shape[1] for matrix in old]
        if widths != [self.width] * self.reads:
            raise ValueError(
                f"the hypernetwork was made for {self.reads} embedding matrices of width {self.width}, but "
                f"the model has {len(widths)} of width {', '.join(map(str, sorted(set(widths))))}: use one "
                "that was trained on this model"
            )


class _Network(nn.Module):
    """Rows of the pieces of U tokens, [U, L, I·D], to [U, O·D]."""

    def __init__(self, options: HypernetOptions, width: int, reads: int, writes: int, max_pieces: int):
        super().__init__()
        self.options = options
        inner = reads * width if options.architecture == "linear" else width
        if options.architecture == "mlp":
            self.read = nn.Linear(3 * reads * width, width)
            self.length = nn.Embedding(max_pieces + 1, width)
        elif options.architecture == "transformer":
            self.read = nn.Linear(reads * width, width)
            self.from_start = nn.Parameter(0.02 * torch.randn(max_pieces, width))
            self.from_end = nn.Parameter(0.02 * torch.randn(max_pieces, width))
            self.padding = nn.Parameter(0.02 * torch.randn(width))
        if options.architecture != "linear":
            heads = (
                options.num_heads if options.architecture == "transformer" and options.use_attention else 0
            )
            self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(options.num_layers))
            self.norm = nn.LayerNorm(width)
        self.write = nn.Linear(inner if options.architecture == "mlp" else 3 * inner, writes * width)
        if options.residual:
            nn.init.zeros_(self.write.weight)
            nn.init.zeros_(self.write.bias)

    def forward(self, rows_ULE: Tensor, length_U: Tensor) -> Tensor:
        """Return [U, O·D]."""
        architecture = self.options.architecture
        if architecture == "linear":
            return self.write(_pooled(rows_ULE, length_U))
        if architecture == "mlp":
            hidden_UD = self.read(_pooled(rows_ULE, length_U)) + self.length(length_U)
            for block in self.blocks:
                hidden_UD = block(hidden_UD, None)
            return self.write(self.norm(hidden_UD))
        return self.write(_pooled(self._transformed(rows_ULE, length_U), length_U))

    def _transformed(self, rows_ULE: Tensor, length_U: Tensor) -> Tensor:
        longest = rows_ULE.shape[1]
        if self.options.use_attention_mask:  # what lies behind the longest token then changes nothing
            longest = max(1, int(length_U.max()))
        step_L = torch.arange(longest, device=length_U.device)
        is_piece_UL = step_L < length_U[:, None]
        left_UL = (length_U[:, None] - 1 - step_L).clamp(min=0)
        hidden_ULD = self.read(rows_ULE[:, :longest]) + self.from_start[:longest] + self.from_end[left_UL]
        hidden_ULD = torch.where(is_piece_UL[..., None], hidden_ULD, self.padding)
        mask_U11L = None
        if self.options.use_attention_mask:
            is_piece_UL = is_piece_UL | (step_L == 0)  # a token without pieces attends to its padding
            mask_U11L = is_piece_UL[:, None, None]
        for block in self.blocks:
            hidden_ULD = block(hidden_ULD, mask_U11L)
        return self.norm(hidden_ULD)


class _Block(nn.Module):
    """Attention, where there are heads, and feed-forward, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        if heads:
            self.attention_norm = nn.LayerNorm(width)
            self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, mask_U11L: Tensor | None) -> Tensor:
        """Return `hidden`, [U, L, D] or [U, D], after this block."""
        if self.heads:
            split = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1))
            query, key, value = split.permute(2, 0, 3, 1, 4)  # each [U, H, L, K]
            mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask_U11L)
            hidden = hidden + self.mix(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(gelu(self.up(self.norm(hidden))))


def _pooled(hidden_ULD: Tensor, length_U: Tensor) -> Tensor:
    """Return mean, first and last of each token's pieces, side by side [U, 3·D]; zeros where it has none."""
    is_piece_UL1 = (torch.arange(hidden_ULD.shape[1], device=length_U.device) < length_U[:, None])[..., None]
    kept_ULD = torch.where(is_piece_UL1, hidden_ULD, 0)
    mean_UD = kept_ULD.sum(1) / length_U.clamp(min=1)[:, None]
    last_UD = kept_ULD[torch.arange(len(length_U), device=length_U.device), (length_U - 1).clamp(min=0)]
    return torch.cat([mean_UD, kept_ULD[:, 0], last_UD], dim=1)
