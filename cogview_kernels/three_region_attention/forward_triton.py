# SPDX-License-Identifier: Apache-2.0
"""The kernel of the forward of three-region attention.

Letters, the order of keys, bytes and FLOPs: see ``triton_kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cogview_kernels._attention_triton import LOWEST, NO_SPECIALIZATION, softmax_step
from cogview_kernels._regions_triton import load_origin, tile_before, window_start, window_stop
from cogview_kernels._triton import LN2, dropout_rows, load_rows, offset, store_rounded
from cogview_kernels.three_region_attention.index_triton import far_range, sees_far


@triton.jit(do_not_specialize=NO_SPECIALIZATION)
def fwd_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, residuals_ptr, out_ptr, lse_ptr, seed,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    H, G, T, PP, stride_i, peaks_at, block_size, window_blocks, factor, bias, keep_threshold, keep_scale,
    HAS_FAR: tl.constexpr, HAS_STARTS: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = sum_j 2^(s_j - m) keep_j v_j / (1 - p) / sum_j 2^(s_j - m);  lse = ln(sum_j 2^s_j).

    The residuals get, from ``peaks_at`` on, the two parts of lse in log2, ``[B, H, 2, T]``: the rounded
    maximum m, and log2(sum_j 2^(s_j - m)) with what m was rounded by. Added up, the second would drown in the
    first, and the backward's probabilities with it."""
    # Not the dtype of k and v, which the interpreter widens.
    IS_FLOAT32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    # The last queries see the most pivots: they start first.
    start_m = (tiles - 1 - pid % tiles) * BLOCK_M
    bh = pid // tiles
    b = bh // H
    h = bh % H
    q_ptr += offset(b, stride_qb) + offset(h, stride_qh)
    k_ptr += offset(b, stride_kb) + offset(h // G, stride_kh)
    v_ptr += offset(b, stride_vb) + offset(h // G, stride_vh)
    rows = start_m + tl.arange(0, BLOCK_M)
    stop_m = tl.minimum(start_m + BLOCK_M, T)
    q = load_rows(q_ptr, rows, stride_qt, rows < T, D, BLOCK_D)
    r0, r1 = rows, rows
    if HAS_DROPOUT:
        r0, r1 = dropout_rows(seed, rows, h, b)

    # Window starts: of each row, of the first and of the last (all the same where block_size % BLOCK_M == 0).
    origin = load_origin(starts_ptr, b, T, HAS_STARTS)
    first_window = window_start(start_m, origin, block_size, window_blocks)
    last_window = window_start(stop_m - 1, origin, block_size, window_blocks)
    first_stop = window_stop(start_m, origin, T, block_size, window_blocks, CAUSAL)
    last_stop = window_stop(stop_m - 1, origin, T, block_size, window_blocks, CAUSAL)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    rest = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    if HAS_FAR:
        index_ptr = residuals_ptr + offset(b, stride_i)
        counts_ptr = index_ptr + PP + T
        full, far_stop, stop, gap, full_again, total_far = far_range(
            counts_ptr, start_m, stop_m, origin, T, block_size, window_blocks, CAUSAL
        )
        for start in tl.range(0, stop, BLOCK_N, num_stages=2 * STAGES - 1):
            index = start + tl.arange(0, BLOCK_N)
            place = index
            if not CAUSAL:
                index += tl.where(index >= far_stop, gap, 0)
                place = tl.minimum(index, PP - 1)
            columns = tl.load(index_ptr + place)
            k = load_rows(k_ptr, columns, stride_kt, columns < T, D, BLOCK_D)
            v = load_rows(v_ptr, columns, stride_vt, columns < T, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            is_full = start + BLOCK_N <= full
            if not CAUSAL:
                is_full = is_full | ((start >= full_again) & (start + BLOCK_N <= stop))
            if not is_full:
                seen = sees_far(
                    counts_ptr, index, rows, origin, T, total_far, block_size, window_blocks, CAUSAL
                )
                s = tl.where(seen, s, float("-inf"))
            acc, row_max, rest, total = softmax_step(
                acc, row_max, rest, total, s, factor, bias, v, columns, r0, r1, keep_threshold,
                IS_FLOAT32, HAS_DROPOUT, PRECISION,
            )  # fmt: skip

    for start in tl.range(first_window, last_stop, BLOCK_N, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, columns, stride_kt, columns < T, D, BLOCK_D)
        v = load_rows(v_ptr, columns, stride_vt, columns < T, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if (start + BLOCK_N > first_stop) | (start < last_window):
            window_starts = window_start(rows, origin, block_size, window_blocks)
            window_stops = window_stop(rows, origin, T, block_size, window_blocks, CAUSAL)
            seen = tile_before(window_stops, start, BLOCK_N) & ~tile_before(window_starts, start, BLOCK_N)
            s = tl.where(seen, s, float("-inf"))
        acc, row_max, rest, total = softmax_step(
            acc, row_max, rest, total, s, factor, 0.0, v, columns, r0, r1, keep_threshold,
            IS_FLOAT32, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    if HAS_STARTS:
        total = tl.where(rows < origin, 1.0, total)
    rest += tl.log2(total)
    lse = (row_max + rest) * LN2
    if HAS_STARTS:
        # A query before its sample sees nothing: the backward's probabilities are 0 where the peak is inf.
        lse = tl.where(rows < origin, float("-inf"), lse)
        row_max = tl.where(rows < origin, float("inf"), row_max)
        acc = tl.where((rows < origin)[:, None], 0.0, acc)
    tl.store(lse_ptr + offset(bh, T) + rows, lse, mask=rows < T)
    peaks_ptr = residuals_ptr + peaks_at + offset(bh, T) * 2 + rows
    tl.store(peaks_ptr, row_max.to(tl.int32, bitcast=True), mask=rows < T)
    tl.store(peaks_ptr + T, rest.to(tl.int32, bitcast=True), mask=rows < T)
    if HAS_DROPOUT:
        acc = acc * keep_scale
    acc = acc / total[:, None]
    d = tl.arange(0, BLOCK_D)
    out_ptr += offset(b, stride_ob) + offset(h, stride_oh)
    # Places in the tile: rows would stay in registers through both loops.
    i = tl.arange(0, BLOCK_M)
    out_ptr += offset(start_m, stride_ot)
    inside = (i < T - start_m)[:, None] & (d < D)[None, :]
    pointers = out_ptr + offset(i, stride_ot)[:, None] + d[None, :]
    store_rounded(pointers, acc, inside, out_ptr.dtype.element_ty)
