# SPDX-License-Identifier: Apache-2.0
"""The kernel of the forward of local attention in two dimensions.

Letters, the order of keys, bytes and FLOPs: see ``triton_kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cogview_kernels._attention_triton import LOWEST, NO_SPECIALIZATION, softmax_step
from cogview_kernels._triton import LN2, dropout_rows, load_rows, offset, store_rounded


@triton.jit
def sees(down, across, row_radius, column_radius, CAUSAL: tl.constexpr):
    """Whether a query sees a key that stands so many rows and columns after the query's cell."""
    seen = (down <= row_radius) & (down >= -row_radius)
    seen = seen & (across <= column_radius) & (across >= -column_radius)
    if CAUSAL:
        seen = seen & ((down < 0) | ((down == 0) & (across <= 0)))
    return seen


@triton.jit
def keys_seen(first, stop, radius, query_scale, length, CAUSAL: tl.constexpr):
    """The first key, and the end of the keys, on one axis, of the queries from ``first`` up to ``stop``."""
    after = 0 if CAUSAL else radius
    last = tl.minimum((stop - 1) // query_scale + after + 1, length)
    return tl.maximum(first // query_scale - radius, 0), last


@triton.jit
def extra_seen(extra_mask_ptr, e, E, HAS_MASK: tl.constexpr):
    seen = e < E
    if HAS_MASK:
        seen = seen & (tl.load(extra_mask_ptr + e, mask=seen, other=0) != 0)
    return seen


@triton.jit(do_not_specialize=NO_SPECIALIZATION)
def fwd_kernel(
    q_ptr, k_ptr, v_ptr, extra_k_ptr, extra_v_ptr, extra_mask_ptr, out_ptr, lse_ptr, peaks_ptr, seed,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ekb, stride_ekh, stride_eke, stride_evb, stride_evh, stride_eve,
    stride_ob, stride_oh, stride_ot,
    H, G, E, height, width, row_radius, column_radius, query_scale, factor, keep_threshold, keep_scale,
    HAS_EXTRA: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDE_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out = sum_j 2^(s_j - m) keep_j v_j / (1 - p) / sum_j 2^(s_j - m);  lse = ln(sum_j 2^s_j).

    ``peaks`` ``[B, H, 2, T]`` get lse in log2 as two parts: the rounded maximum m, and
    log2(sum_j 2^(s_j - m)) with what m was rounded by. Added up, the second would drown in the first."""
    IS_FLOAT32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    query_height, query_width = height * query_scale, width * query_scale
    T = query_height * query_width
    across = tl.cdiv(query_width, WIDE_M)
    tiles = tl.cdiv(query_height, BLOCK_M // WIDE_M) * across
    pid = tl.program_id(0)
    y0 = pid % tiles // across * (BLOCK_M // WIDE_M)
    x0 = pid % tiles % across * WIDE_M
    bh = pid // tiles
    b = bh // H
    h = bh % H
    q_ptr += offset(b, stride_qb) + offset(h, stride_qh)
    k_ptr += offset(b, stride_kb) + offset(h // G, stride_kh)
    v_ptr += offset(b, stride_vb) + offset(h // G, stride_vh)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    y, x = y0 + m // WIDE_M, x0 + m % WIDE_M
    inside = (y < query_height) & (x < query_width)
    rows = y * query_width + x
    cell_y, cell_x = y // query_scale, x // query_scale
    q = load_rows(q_ptr, rows, stride_qt, inside, D, BLOCK_D)
    r0, r1 = rows, rows
    if HAS_DROPOUT:
        r0, r1 = dropout_rows(seed, rows, h, b)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    rest = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    stop_y = tl.minimum(y0 + BLOCK_M // WIDE_M, query_height)
    stop_x = tl.minimum(x0 + WIDE_M, query_width)
    first_row, stop_row = keys_seen(y0, stop_y, row_radius, query_scale, height, CAUSAL)
    first_column, stop_column = keys_seen(x0, stop_x, column_radius, query_scale, width, False)
    tiles_x = tl.cdiv(stop_column - first_column, WIDE_N)
    tiles_y = tl.cdiv(stop_row - first_row, BLOCK_N // WIDE_N)
    for t in tl.range(0, tiles_x * tiles_y, num_stages=STAGES):
        row = first_row + t // tiles_x * (BLOCK_N // WIDE_N) + n // WIDE_N
        column = first_column + t % tiles_x * WIDE_N + n % WIDE_N
        there = (row < stop_row) & (column < stop_column)
        columns = row * width + column
        k = load_rows(k_ptr, columns, stride_kt, there, D, BLOCK_D)
        v = load_rows(v_ptr, columns, stride_vt, there, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        seen = sees(
            row[None, :] - cell_y[:, None], column[None, :] - cell_x[:, None],
            row_radius, column_radius, CAUSAL,
        )  # fmt: skip
        s = tl.where(seen & there[None, :], s, float("-inf"))
        acc, row_max, rest, total = softmax_step(
            acc, row_max, rest, total, s, factor, 0.0, v, columns, r0, r1, keep_threshold,
            IS_FLOAT32, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    if HAS_EXTRA:
        extra_k_ptr += offset(b, stride_ekb) + offset(h // G, stride_ekh)
        extra_v_ptr += offset(b, stride_evb) + offset(h // G, stride_evh)
        if HAS_MASK:
            extra_mask_ptr += offset(b, E)
        for start in tl.range(0, E, BLOCK_N, num_stages=STAGES):
            e = start + n
            k = load_rows(extra_k_ptr, e, stride_eke, e < E, D, BLOCK_D)
            v = load_rows(extra_v_ptr, e, stride_eve, e < E, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s = tl.where(extra_seen(extra_mask_ptr, e, E, HAS_MASK)[None, :], s, float("-inf"))
            acc, row_max, rest, total = softmax_step(
                acc, row_max, rest, total, s, factor, 0.0, v, height * width + e, r0, r1, keep_threshold,
                IS_FLOAT32, HAS_DROPOUT, PRECISION,
            )  # fmt: skip

    total = tl.where(inside, total, 1.0)
    rest += tl.log2(total)
    tl.store(lse_ptr + offset(bh, T) + rows, (row_max + rest) * LN2, mask=inside)
    peaks_ptr += offset(bh, T) * 2 + rows
    tl.store(peaks_ptr, row_max, mask=inside)
    tl.store(peaks_ptr + T, rest, mask=inside)
    if HAS_DROPOUT:
        acc = acc * keep_scale
    acc = acc / total[:, None]
    d = tl.arange(0, BLOCK_D)
    out_ptr += offset(b, stride_ob) + offset(h, stride_oh)
    pointers = out_ptr + offset(rows, stride_ot)[:, None] + d[None, :]
    store_rounded(pointers, acc, inside[:, None] & (d < D)[None, :], out_ptr.dtype.element_ty)
