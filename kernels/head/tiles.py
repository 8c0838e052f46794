"""How logits are cut, and the memory that pieces share.

    chunks     whole rows of logits, a few tokens at a time: for what reads a row's every logit twice
    width      of a tile of the vocabulary, all tokens at once: for what one look at each logit is enough
    Buffer     the memory of a piece, reused by the next

Where Triton runs, pieces have the shape that a GPU's GEMMs are fast in: rows in multiples of 128, strides in
multiples of 64 elements (a row of 16-bit numbers then begins where the copy engine can fetch it), and tiles
so wide that a GEMM is long beside its launch.

Dimensions: N tokens, V columns, D hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenkit.kernels import launch

TILE_BYTES = 128 * 2**20  # of a float32 tile on a GPU
TILE_FLOP = 12 * 10**10  # of a tile's GEMM on a GPU: 150 µs of an H200 (calculated at 790 TFLOP/s)
ROWS = 128  # of a tile of cuBLAS
STRIDE = 64  # elements
GROUP_ROWS = 4096  # tokens that one weight gradient adds up, where there are as many and they fit

DEVICE_SHARE = 16  # what one loss may take of a GPU's memory
MOST_WORKSPACE_BYTES = 8 * 2**30
CPU_WORKSPACE_BYTES = 256 * 2**20

COLUMNS = (128, 8192)
"""Fewest of a tile: GEMMs smaller than this waste time; most that one program holds in registers."""


def chunks(N: int, row_bytes: int, workspace_bytes: int, *, rounded: bool = False) -> list[slice]:
    """Cut N tokens into equal chunks, of one token at least, whose buffers fit into `workspace_bytes`.

    With a divided vocabulary every process must pass the same numbers: chunks are where they meet.

    Args:
        N: tokens.
        row_bytes: what each of them takes.
        workspace_bytes: what all of a chunk may take.
        rounded: cut at multiples of `ROWS`, where a chunk has room for so many.
    """
    most = max(workspace_bytes // max(row_bytes, 1), 1)
    count = math.ceil(N / most)
    if count == 0:
        return []
    size = math.ceil(N / count)
    if rounded and count > 1 and most >= ROWS:
        size = min(math.ceil(size / ROWS), most // ROWS) * ROWS
    return [slice(start, min(start + size, N)) for start in range(0, N, size)]


def grouped(N: int, row_bytes: int, low_bytes: int, workspace_bytes: int) -> list[list[slice]]:
    """Cut N tokens into groups of chunks: the dz of a group lie side by side and enter the GEMMs together.

    Args:
        N: tokens.
        row_bytes: what each of a chunk takes.
        low_bytes: what the dz of each of a group takes; 0: it lies over the logits, and chunks are alone.
        workspace_bytes: what all may take. `GROUP_ROWS` tokens make a group where they fit beside a chunk.
    """
    if not low_bytes:
        return [[rows] for rows in chunks(N, row_bytes, workspace_bytes)]
    most = max(workspace_bytes // 2, min(GROUP_ROWS * low_bytes, workspace_bytes - ROWS * row_bytes))
    found = []
    for group in chunks(N, low_bytes, most, rounded=True):
        size = group.stop - group.start
        parts = chunks(size, row_bytes, workspace_bytes - size * low_bytes, rounded=True)
        found.append([slice(group.start + rows.start, group.start + rows.stop) for rows in parts])
    return found


def width(N: int, itemsize: int, most_bytes: int, columns: tuple[int, int]) -> int:
    """Return how many columns a tile of all tokens has: what fits, between the fewest and the most."""
    fewest, most = columns
    fits = most_bytes // (max(N, 1) * itemsize) // fewest * fewest
    return min(max(fits, fewest), most)


def flop_width(N: int, D: int) -> int:
    """Return how many columns make a GEMM of `TILE_FLOP`, a multiple of 256."""
    return math.ceil(TILE_FLOP / (2 * max(N, 1) * D) / 256) * 256


def default_workspace(device: torch.device | str) -> int:
    """Return the bytes that an operation may take where nobody says: a sixteenth of a GPU's memory.

    At most 8 GiB, which holds exp(z - m) of 16,384 tokens and 256k ids; elsewhere 256 MiB, more of which was
    no faster on a CPU.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return CPU_WORKSPACE_BYTES
    return min(torch.cuda.get_device_properties(device).total_memory // DEVICE_SHARE, MOST_WORKSPACE_BYTES)


class Buffer:
    """Memory that every piece reuses: a fresh allocation of a tile costs a CPU its page faults again."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.padded = launch.runs_triton(like)
        """Whether rows begin at multiples of `STRIDE` elements: a CPU reads adjacent ones faster."""
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return [rows, columns], uninitialised, its columns adjacent."""
        stride = math.ceil(columns / STRIDE) * STRIDE if self.padded else columns
        flat = self.kept.get((name, dtype))
        if flat is None or flat.numel() < rows * stride:
            self.kept[name, dtype] = flat = self.like.new_empty(rows * stride, dtype=dtype)
        return flat[: rows * stride].view(rows, stride)[:, :columns]
