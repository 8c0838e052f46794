"""A network that writes embedding rows for new tokens from the old rows of their pieces.

    base(t)  = mean of the old rows of the pieces of t        (what FVT would write)
    row(t)   = base(t) + alpha * scale * network(pieces of t)   with `residual`
    row(t)   = scale * network(pieces of t)                     without

`scale` is the standard deviation of the old matrix. With `residual` the last projection begins at 0: before
training the rows are FVT's, bit for bit. Inside distillation base(t) is a row that is trained itself
(embeddings/projector.py). Every architecture ends in a projection of three vectors per token, the mean, the
first and the last of its pieces: a head wants to know how a token begins, a body what it ended with.

    linear       that projection alone, of the old rows themselves
    mlp          `num_layers` feed-forward blocks of width D between
    transformer  `num_layers` blocks over the pieces of a token, each attention and feed-forward

Special tokens, and tokens with nothing to write them with, keep FVT's row.

Source: Minixhofer et al., "Zero-Shot Tokenizer Transfer", 2024 (arXiv:2405.07883), section 3.
Dimensions: V new tokens, W old tokens, D hidden size, L pieces that the network reads of a token, I old
matrices that it reads, O matrices that it writes, U tokens of one slab, M pieces that each of them has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from tokenkit.embeddings.hypernet_options import HypernetOptions
from tokenkit.embeddings.rows import LABELS, RowSources

MAX_PIECES = 16  # a token of more pieces than this is rare; its base is the mean of all of them
SLAB = 16_384  # pieces that a network reads at a time
KEPT_SLABS = 4  # with more, activations are computed again in the backward pass


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
    order_V: Tensor
    """int64, the tokens by `length_V`, shortest first."""
    place_V: Tensor
    """int64, where each token stands in that order."""
    count_L: tuple[int, ...]
    """How many tokens have 0, 1, … L pieces; on the host, where slabs are cut."""

    def to(self, device: torch.device) -> Surfaces:
        """Return the same surfaces on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "count_L"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def surfaces(sources: RowSources, max_pieces: int = MAX_PIECES, size: int | None = None) -> Surfaces:
    """Lay out the pieces of every token as a matrix.

    Args:
        sources: the pieces of each token.
        max_pieces: L.
        size: number of rows; those behind the last token are padding, without pieces. None: no padding.
    """
    padding = (size or len(sources.offset_V)) - len(sources.offset_V)
    offset_V = torch.cat([sources.offset_V, torch.full((padding,), len(sources.old_ids_K))])
    count, end_V = len(offset_V), torch.cat([offset_V[1:], torch.tensor([len(sources.old_ids_K)])])
    length_V = (end_V - offset_V).clamp(max=max_pieces)
    step_L = torch.arange(max_pieces)
    is_piece_VL = step_L < length_V[:, None]
    pieces_VL = torch.zeros(count, max_pieces, dtype=torch.int64)
    pieces_VL[is_piece_VL] = sources.old_ids_K[(offset_V[:, None] + step_L)[is_piece_VL]]
    method_V = torch.full((count,), LABELS.index("mean_of_all"), dtype=torch.uint8)
    method_V[: count - padding] = torch.from_numpy(sources.method_V)
    order_V = torch.argsort(length_V, stable=True)
    is_special_V = method_V == LABELS.index("special")
    return Surfaces(
        sources.old_ids_K,
        offset_V,
        pieces_VL,
        length_V,
        (length_V > 0) & ~is_special_V,
        method_V == LABELS.index("mean_of_all"),
        order_V,
        torch.argsort(order_V),
        tuple(torch.bincount(length_V, minlength=max_pieces + 1).tolist()),
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

    def forward(
        self, surfaces: Surfaces, old: Sequence[Tensor], base: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Return O matrices of new rows, [V, D], in the dtype of their base; differentiable in all matrices.

        Args:
            surfaces: of the new tokens, with `max_pieces` of this network.
            old: I matrices [W, D].
            base: O matrices [V, D], to which the network adds; None: FVT's rows.

        Raises:
            ValueError: matrices of another width or number.
        """
        self.check(old)
        which = [min(index, self.reads - 1) for index in range(self.writes)]
        if base is None:
            means = [mean_rows(surfaces, matrix) for matrix in old]
            base = [means[index] for index in which]
        if self.options.architecture == "identity":
            return list(base)
        written_VOD = self._written(surfaces, old)
        is_read_V1 = surfaces.is_read_V[:, None]
        rows = []
        for index, (source, base_VD) in enumerate(zip(which, base, strict=True)):
            delta_VD = self.scale_I[source] * written_VOD[:, index]
            changed_VD = (
                base_VD + self.options.residual_alpha * delta_VD if self.options.residual else delta_VD
            )
            rows.append(torch.where(is_read_V1, changed_VD.to(base_VD.dtype), base_VD))
        return rows

    def _written(self, surfaces: Surfaces, old: Sequence[Tensor]) -> Tensor:
        """Run the networks, a slab of tokens at a time: [V, O, D]; zeros for tokens without pieces."""
        cuts = self._cuts(surfaces.count_L)
        pieces = sum((stop - start) * longest for start, stop, longest in cuts)
        recompute = torch.is_grad_enabled() and pieces > KEPT_SLABS * SLAB
        slabs = []
        for start, stop, longest in cuts:
            token_U = surfaces.order_V[start:stop]
            pieces_UM, length_U = surfaces.pieces_VL[token_U, :longest], surfaces.length_V[token_U]
            if recompute:
                slabs.append(checkpoint(self._slab, old, pieces_UM, length_U, use_reentrant=False))
            else:
                slabs.append(self._slab(old, pieces_UM, length_U))
        rows_VF = torch.cat(slabs) if slabs else old[0].new_zeros(0, self.writes * self.width)
        rows_VF = torch.cat([rows_VF.new_zeros(surfaces.count_L[0], rows_VF.shape[1]), rows_VF])
        return rows_VF[surfaces.place_V].unflatten(1, (self.writes, self.width))

    def _cuts(self, count_L: Sequence[int]) -> list[tuple[int, int, int]]:
        """Cut the ordered tokens that have pieces: (start, stop, pieces that are read of each).

        Tokens of a slab have one length, so that nothing is computed for padding; where padding is attended
        to, every length is the longest.
        """
        attends_to_padding = any(network.padding is not None for network in self.networks)
        cuts, start = [], count_L[0]
        for length, count in enumerate(count_L[1:], 1):
            longest = self.max_pieces if attends_to_padding else length
            step = max(1, SLAB // longest)
            cuts += [(at, min(at + step, start + count), longest) for at in range(start, start + count, step)]
            start += count
        return cuts

    def _slab(self, old: Sequence[Tensor], pieces_UM: Tensor, length_U: Tensor) -> Tensor:
        dtype = next(self.networks.parameters()).dtype
        scaled = [m[pieces_UM].to(dtype) / s for m, s in zip(old, self.scale_I.unbind(), strict=True)]
        rows_UME = torch.cat(scaled, dim=2)
        return torch.cat([network(rows_UME, length_U) for network in self.networks], dim=1)

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
    """Rows of the pieces of U tokens, [U, M, I·D], to [U, O·D]."""

    def __init__(self, options: HypernetOptions, width: int, reads: int, writes: int, max_pieces: int):
        super().__init__()
        self.options, self.padding = options, None
        inner = reads * width if options.architecture == "linear" else width
        if options.architecture == "mlp":
            self.read = nn.Linear(3 * reads * width, width)
            self.length = nn.Embedding(max_pieces + 1, width)
        elif options.architecture == "transformer":
            self.read = nn.Linear(reads * width, width)
            self.from_start = nn.Parameter(0.02 * torch.randn(max_pieces, width))
            self.from_end = nn.Parameter(0.02 * torch.randn(max_pieces, width))
            attends_to_padding = options.use_attention and not options.use_attention_mask
            self.padding = nn.Parameter(0.02 * torch.randn(width)) if attends_to_padding else None
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

    def forward(self, rows_UME: Tensor, length_U: Tensor) -> Tensor:
        """Return [U, O·D]."""
        architecture = self.options.architecture
        if architecture == "linear":
            return self.write(_pooled(rows_UME, length_U))
        if architecture == "mlp":
            hidden_UD = self.read(_pooled(rows_UME, length_U)) + self.length(length_U)
            for block in self.blocks:
                hidden_UD = block(hidden_UD)
            return self.write(self.norm(hidden_UD))
        return self.write(_pooled(self._transformed(rows_UME, length_U), length_U))

    def _transformed(self, rows_UME: Tensor, length_U: Tensor) -> Tensor:
        longest = rows_UME.shape[1]
        step_M = torch.arange(longest, device=length_U.device)
        left_UM = (length_U[:, None] - 1 - step_M).clamp(min=0)
        hidden_UMD = self.read(rows_UME) + self.from_start[:longest] + self.from_end[left_UM]
        if self.padding is not None:
            is_piece_UM1 = (step_M < length_U[:, None])[..., None]
            hidden_UMD = torch.where(is_piece_UM1, hidden_UMD, self.padding.to(hidden_UMD.dtype))
        for block in self.blocks:
            hidden_UMD = block(hidden_UMD)
        return self.norm(hidden_UMD)


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

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `hidden`, [U, M, D] or [U, D], after this block."""
        if self.heads:
            split = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1))
            query, key, value = split.permute(2, 0, 3, 1, 4)  # each [U, H, M, K]
            mixed = scaled_dot_product_attention(query, key, value)
            hidden = hidden + self.mix(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(gelu(self.up(self.norm(hidden))))


def _pooled(hidden_UMD: Tensor, length_U: Tensor) -> Tensor:
    """Return mean, first and last of each token's pieces, side by side [U, 3·D]; zeros where it has none."""
    is_piece_UM1 = (torch.arange(hidden_UMD.shape[1], device=length_U.device) < length_U[:, None])[..., None]
    kept_UMD = torch.where(is_piece_UM1, hidden_UMD, 0)
    mean_UD = kept_UMD.sum(1) / length_U.clamp(min=1)[:, None]
    last_UD = kept_UMD[torch.arange(len(length_U), device=length_U.device), (length_U - 1).clamp(min=0)]
    return torch.cat([mean_UD, kept_UMD[:, 0], last_UD], dim=1)
