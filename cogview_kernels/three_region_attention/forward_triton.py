# SPDX-License-Identifier: Apache-2.0
"""The kernels of the forward of three-region attention, the index of the pivots among them.

Letters, the order of keys, bytes and FLOPs: see ``triton_kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cogview_kernels._attention_triton import LOWEST, NO_SPECIALIZATION, softmax_step
from cogview_kernels._regions_triton import in_window, window_start, window_start_of_block
from cogview_kernels._triton import LN2, dropout_rows, load_rows, offset, store_rounded


@triton.jit
def index_kernel(
    pivots_ptr, residuals_ptr, P, PP, T, stride_i, block_size, window_blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each sample, in a row of ``stride_i`` integers: the pivots in ascending order, T where padded up to
    PP; the rank of each position among them, -1 for those that are none (T of them); and how many pivots lie
    left of the window of each block of the layout.

    One program a sample. It marks the pivots among the positions (where the ranks will stand), and a running
    count of the marks is all three. A pivot wrongly given twice counts once, one past T not at all."""
    b = tl.program_id(0)
    pivots_ptr += offset(b, P)
    sorted_ptr = residuals_ptr + offset(b, stride_i)
    rank_ptr = sorted_ptr + PP
    far_counts_ptr = rank_ptr + T
    lanes = tl.arange(0, BLOCK)
    for start in range(0, T, BLOCK):
        tl.store(rank_ptr + start + lanes, tl.zeros([BLOCK], tl.int32), mask=start + lanes < T)
    for start in range(0, PP, BLOCK):
        tl.store(sorted_ptr + start + lanes, tl.zeros([BLOCK], tl.int32) + T, mask=start + lanes < PP)
    tl.debug_barrier()
    for start in range(0, P, BLOCK):
        pivot = tl.load(pivots_ptr + start + lanes, mask=start + lanes < P, other=-1).to(tl.int32)
        tl.store(rank_ptr + pivot, tl.full([BLOCK], 1, tl.int32), mask=(pivot >= 0) & (pivot < T))
    tl.debug_barrier()
    before = 0
    for start in range(0, T, BLOCK):
        position = start + lanes
        mark = tl.load(rank_ptr + position, mask=position < T, other=0)
        rank = before + tl.cumsum(mark, axis=0) - mark
        tl.store(rank_ptr + position, tl.where(mark == 1, rank, -1), mask=position < T)
        tl.store(sorted_ptr + rank, position, mask=mark == 1)
        # Where the window of a block begins, the count so far is how many pivots lie left of it.
        block = position // block_size + window_blocks - 1
        begins = window_start_of_block(block, block_size, window_blocks) == position
        tl.store(far_counts_ptr + block, rank, mask=begins & (block * block_size < T))
        before += tl.sum(mark, axis=0)
    for start in range(0, window_blocks, BLOCK):
        # The windows of these blocks begin with the first position.
        tl.store(
            far_counts_ptr + start + lanes, tl.zeros([BLOCK], tl.int32), mask=start + lanes < window_blocks
        )


@triton.jit(do_not_specialize=NO_SPECIALIZATION)
def fwd_kernel(
    q_ptr, k_ptr, v_ptr, residuals_ptr, out_ptr, lse_ptr, seed,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    H, G, T, PP, stride_i, peaks_at, block_size, window_blocks, factor, bias, keep_threshold, keep_scale,
    HAS_FAR: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
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
    first_window = window_start(start_m, block_size, window_blocks)
    last_window = window_start(stop_m - 1, block_size, window_blocks)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    rest = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    if HAS_FAR:
        index_ptr = residuals_ptr + offset(b, stride_i)
        far_counts_ptr = index_ptr + PP + T
        full = tl.load(far_counts_ptr + start_m // block_size)
        stop = tl.load(far_counts_ptr + (stop_m - 1) // block_size)
        for start in tl.range(0, stop, BLOCK_N, num_stages=2 * STAGES - 1):
            index = start + tl.arange(0, BLOCK_N)
            columns = tl.load(index_ptr + index)
            k = load_rows(k_ptr, columns, stride_kt, columns < T, D, BLOCK_D)
            v = load_rows(v_ptr, columns, stride_vt, columns < T, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if start + BLOCK_N > full:
                far_count = tl.load(far_counts_ptr + rows // block_size, mask=rows < T, other=0)
                s = tl.where(index[None, :] < far_count[:, None], s, float("-inf"))
            acc, row_max, rest, total = softmax_step(
                acc, row_max, rest, total, s, factor, bias, v, columns, r0, r1, keep_threshold,
                IS_FLOAT32, HAS_DROPOUT, PRECISION,
            )  # fmt: skip

    for start in tl.range(first_window, stop_m, BLOCK_N, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, columns, stride_kt, columns < T, D, BLOCK_D)
        v = load_rows(v_ptr, columns, stride_vt, columns < T, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if (start + BLOCK_N > start_m + 1) | (start < last_window):
            starts = window_start(rows, block_size, window_blocks)
            seen = in_window(columns[None, :], rows[:, None], starts[:, None])
            s = tl.where(seen, s, float("-inf"))
        acc, row_max, rest, total = softmax_step(
            acc, row_max, rest, total, s, factor, 0.0, v, columns, r0, r1, keep_threshold,
            IS_FLOAT32, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    rest += tl.log2(total)
    tl.store(lse_ptr + offset(bh, T) + rows, (row_max + rest) * LN2, mask=rows < T)
    peaks_ptr = residuals_ptr + peaks_at + offset(bh, T) * 2 + rows
    tl.store(peaks_ptr, row_max.to(tl.int32, bitcast=True), mask=rows < T)
    tl.store(peaks_ptr + T, rest.to(tl.int32, bitcast=True), mask=rows < T)
    if HAS_DROPOUT:
        acc = acc * keep_scale
    acc = acc / total[:, None]
    d = tl.arange(0, BLOCK_D)
    out_ptr += offset(b, stride_ob) + offset(h, stride_oh)
    inside = (rows < T)[:, None] & (d < D)[None, :]
    pointers = out_ptr + offset(rows, stride_ot)[:, None] + d[None, :]
    store_rounded(pointers, acc, inside, out_ptr.dtype.element_ty)
