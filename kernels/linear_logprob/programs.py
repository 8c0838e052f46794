"""The Triton kernels of `fused.py`: programs that keep a tile of z in registers.

The formulas are those of `operation.py`; bias, mask of the subset, order and cap may be None.

Dimensions: N tokens, V rows of the head, D hidden size, S stretches, P parts of the vocabulary (R, S).
"""

from __future__ import annotations

from tokenkit.kernels.head.logits import base_triton, logits_triton
from tokenkit.kernels.language import tl, triton


@triton.jit
def _tile(
    matrix, row, channel, ROWS, D,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix, given as a descriptor or as a pointer; 0 behind its end."""
    if TMA:
        tile = matrix.load([row, channel])
    else:
        offs_r = row + tl.arange(0, BLOCK_ROWS)
        offs_d = channel + tl.arange(0, BLOCK_D)
        mask = (offs_r < ROWS)[:, None] & (offs_d < D)[None, :]
        tile = tl.load(matrix + offs_r.to(tl.int64)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _product(
    hidden, weight, n, v, N, V, D,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tokens times rows of the head, over all channels; of float32 every bit is multiplied."""
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        hidden_tile = _tile(hidden, n, d, N, D, BLOCK_N, BLOCK_D, TMA)
        weight_tile = _tile(weight, v, d, V, D, BLOCK_V, BLOCK_D, TMA)
        z = tl.dot(hidden_tile, weight_tile.T, z, input_precision="ieee")
    return z


@triton.jit
def _statistics_kernel(
    hidden, weight, bias_ptr, inside_ptr, row_ptr, max_ptr, sum_ptr, z_target_ptr,
    N, V, D, stretch,
    alpha, cap,
    TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens and stretch of the vocabulary: online (max, sum) of both parts."""
    n = tl.program_id(0) * BLOCK_N
    offs_n = n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    first = tl.program_id(1) * stretch
    last = tl.minimum(first + stretch, V)
    row = tl.load(row_ptr + offs_n, mask=mask_n, other=-1)
    m_rest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    m_subset = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    s_rest = tl.zeros((BLOCK_N,), tl.float32)
    s_subset = tl.zeros((BLOCK_N,), tl.float32)
    z_target = tl.zeros((BLOCK_N,), tl.float32)

    for v in range(first, last, BLOCK_V):
        offs_v = v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < last
        z = _product(hidden, weight, n, v, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D, TMA)
        z, _ = logits_triton(z, bias_ptr, offs_v, mask_v, alpha, cap)
        is_target = offs_v[None, :] == row[:, None]
        z_target += tl.sum(tl.where(is_target, z, 0.0), axis=1)
        z = tl.where(mask_v[None, :], z, float("-inf"))
        if inside_ptr is not None:
            inside = tl.load(inside_ptr + offs_v, mask=mask_v, other=0)[None, :] != 0
            m = tl.maximum(m_subset, tl.max(tl.where(inside, z, float("-inf")), axis=1))
            base_subset = base_triton(m)
            s_subset *= tl.exp(m_subset - base_subset)
            m_subset = m
            m = tl.maximum(m_rest, tl.max(tl.where(inside, float("-inf"), z), axis=1))
            base_rest = base_triton(m)
            s_rest *= tl.exp(m_rest - base_rest)
            m_rest = m
            p = tl.exp(z - tl.where(inside, base_subset[:, None], base_rest[:, None]))
            p = tl.where(is_target, 0.0, p)
            s_subset += tl.sum(tl.where(inside, p, 0.0), axis=1)
            s_rest += tl.sum(tl.where(inside, 0.0, p), axis=1)
        else:
            m = tl.maximum(m_rest, tl.max(z, axis=1))
            base_rest = base_triton(m)
            p = tl.where(is_target, 0.0, tl.exp(z - base_rest[:, None]))
            s_rest = s_rest * tl.exp(m_rest - base_rest) + tl.sum(p, axis=1)
            m_rest = m

    place = tl.program_id(1).to(tl.int64) * 2 * N + offs_n  # [S, P, N]
    tl.store(max_ptr + place, m_rest, mask=mask_n)
    tl.store(sum_ptr + place, s_rest, mask=mask_n)
    tl.store(max_ptr + place + N, m_subset, mask=mask_n)
    tl.store(sum_ptr + place + N, s_subset, mask=mask_n)
    tl.store(z_target_ptr + offs_n, z_target, mask=mask_n & (row >= first) & (row < last))


@triton.jit
def _frozen_kernel(
    hidden_ptr, weight_ptr, order_ptr, bias_ptr, position_ptr, max_ptr, sum_ptr, z_target_ptr, mean_ptr,
    start, end, N, D, stretch,
    alpha, cap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens and stretch of one part: (max, sum), and the sum of exp(z - m) W."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_d = tl.arange(0, BLOCK_D)
    mask_nd = mask_n[:, None] & (offs_d < D)[None, :]
    first = start + tl.program_id(1) * stretch
    last = tl.minimum(first + stretch, end)
    position = tl.load(position_ptr + offs_n, mask=mask_n, other=-1)
    hidden = tl.load(hidden_ptr + offs_n[:, None] * D + offs_d[None, :], mask=mask_nd, other=0.0)
    m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    z_target = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    for v in range(first, last, BLOCK_V):
        offs_v = v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < last
        rows = offs_v.to(tl.int64)  # row * D passes 2**31 at 8M rows of 256
        if order_ptr is not None:
            rows = tl.load(order_ptr + offs_v, mask=mask_v, other=0)
        mask_vd = mask_v[:, None] & (offs_d < D)[None, :]
        weight = tl.load(weight_ptr + rows[:, None] * D + offs_d[None, :], mask=mask_vd, other=0.0)
        z = tl.dot(hidden, weight.T, input_precision="ieee")
        z, slope = logits_triton(z, bias_ptr, rows, mask_v, alpha, cap)
        is_target = offs_v[None, :] == position[:, None]
        z_target += tl.sum(tl.where(is_target, z, 0.0), axis=1)
        z = tl.where(mask_v[None, :], z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, axis=1))
        p = tl.where(is_target, 0.0, tl.exp(z - base_triton(m_new)[:, None]))
        shrink = tl.exp(m - base_triton(m_new))
        s = s * shrink + tl.sum(p, axis=1)
        p *= slope
        mean = tl.dot(p.to(weight.dtype), weight, mean * shrink[:, None], input_precision="ieee")
        m = m_new

    place = tl.program_id(1).to(tl.int64) * N + offs_n  # [S, N]
    tl.store(max_ptr + place, m, mask=mask_n)
    tl.store(sum_ptr + place, s, mask=mask_n)
    tl.store(z_target_ptr + offs_n, z_target, mask=mask_n & (position >= first) & (position < last))
    tl.store(mean_ptr + place[:, None] * D + offs_d[None, :], mean, mask=mask_nd)


@triton.jit
def _gradient_kernel(
    hidden, weight, other, bias_ptr, inside_ptr, row_ptr, numbers_ptr, out_ptr, dbias_ptr,
    N, V, D,
    alpha, cap,
    OWNS_TOKENS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens (dX) or rows of the head (dW) and chunk of channels.

    z is built as the statistics built it, hidden times weight in steps of BLOCK_D: where softmax is one
    number alone, an error of z that both share drops out.
    """
    BLOCK_OWN: tl.constexpr = BLOCK_N if OWNS_TOKENS else BLOCK_V
    BLOCK_OTHER: tl.constexpr = BLOCK_V if OWNS_TOKENS else BLOCK_N
    own = tl.program_id(0) * BLOCK_OWN
    chunk = tl.program_id(1) * CHUNK
    total = tl.zeros((BLOCK_OWN, CHUNK), tl.float32)
    dbias = tl.zeros((BLOCK_OWN,), tl.float32)
    for start in range(0, V if OWNS_TOKENS else N, BLOCK_OTHER):
        n = own if OWNS_TOKENS else start
        v = start if OWNS_TOKENS else own
        offs_n = n + tl.arange(0, BLOCK_N)
        offs_v = v + tl.arange(0, BLOCK_V)
        mask_n, mask_v = offs_n < N, offs_v < V
        z = _product(hidden, weight, n, v, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D, TMA)
        base = tl.load(numbers_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
        factor = tl.load(numbers_ptr + 2 * N + offs_n, mask=mask_n, other=0.0)[:, None]
        if inside_ptr is not None:
            inside = tl.load(inside_ptr + offs_v, mask=mask_v, other=0)[None, :] != 0
            base_subset = tl.load(numbers_ptr + N + offs_n, mask=mask_n, other=0.0)[:, None]
            factor_subset = tl.load(numbers_ptr + 3 * N + offs_n, mask=mask_n, other=0.0)[:, None]
            base = tl.where(inside, base_subset, base)
            factor = tl.where(inside, factor_subset, factor)
        z, slope = logits_triton(z, bias_ptr, offs_v, mask_v, alpha, cap)
        dz = tl.exp(z - base) * (factor * slope)
        dz_target = tl.load(numbers_ptr + 4 * N + offs_n, mask=mask_n, other=0.0)[:, None]
        is_target = offs_v[None, :] == tl.load(row_ptr + offs_n, mask=mask_n, other=-1)[:, None]
        dz = tl.where(is_target, dz_target, dz)
        dz = tl.where(mask_n[:, None] & mask_v[None, :], dz, 0.0)  # behind the end z is no logit
        operand = _tile(other, start, chunk, V if OWNS_TOKENS else N, D, BLOCK_OTHER, CHUNK, TMA)
        if OWNS_TOKENS:
            total = tl.dot(dz.to(operand.dtype), operand, total, input_precision="ieee")
        else:
            total = tl.dot(dz.T.to(operand.dtype), operand, total, input_precision="ieee")
            if dbias_ptr is not None:
                dbias += tl.sum(dz, axis=0)
    offs_own = own + tl.arange(0, BLOCK_OWN)
    mask_own = offs_own < (N if OWNS_TOKENS else V)
    if out_ptr is not None:
        offs_d = chunk + tl.arange(0, CHUNK)
        place = offs_own.to(tl.int64)[:, None] * D + offs_d[None, :]
        mask = mask_own[:, None] & (offs_d < D)[None, :]
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs_own, dbias.to(dbias_ptr.dtype.element_ty), mask=mask_own & (chunk == 0))
