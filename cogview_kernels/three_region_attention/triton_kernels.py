# SPDX-License-Identifier: Apache-2.0
"""Three-region attention on NVIDIA GPUs from compute capability 8.0.

Letters: B samples, H query heads, G query heads a key head, T positions, D head size (BLOCK_D the power of
two it is padded to), P pivots a sample, NB = ceil(T / block_size) blocks of the layout; tiles have BLOCK_M
queries and BLOCK_N keys. TP and PP are T and P rounded up to whole tiles: loads of what has as many entries
need no mask, which in a loop costs more than the load.

Pivots are sorted first. Those left of a query's window are then a prefix of the list, so a tile of queries
walks two loops under one softmax: the prefix, then the window. Every tile is full but those at the end of the
prefix and on the diagonal (and, where block_size is no multiple of BLOCK_M, at the start of the window); a
tile that is not full takes a branch that masks it. Key j counts for the queries from first(j) up to end(j),
so a tile of keys walks one loop over queries with a mask at its ends alone.

Keys and values of pivots are gathered where they are used: a row of D elements fills whole sectors of
memory, the loop loads positions one stage ahead of rows, and no packed copy is made. Their gradients are
written packed, each by one program, and added by the rank of a pivot to those of the window: no atomics.

Scores are in units of log2, s = q.k * factor + bias, with factor = scale * log2(e) and bias = pivot_bias *
log2(e) or 0: 2^s costs one multiply-add and one ex2 an element.

FLOPs: with N visible (query, key) pairs of all heads, forward 4 N D (two products), backward 14 N D (seven:
scores and dprobs twice). Bytes, forward: q and out once, k and v of a tile's window and prefix by each tile
of queries, out of the L2 cache for the most part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels._dropout import Dropout
from cogview_kernels._regions_triton import (
    first_query_past,
    in_window,
    window_start,
    window_start_of_block,
)
from cogview_kernels._triton import (
    LN2,
    LOG2E,
    Launch,
    Plans,
    dropout_arguments,
    dropout_keeps,
    dropout_rows,
    load_rows,
    offset,
    store_rounded,
)
from cogview_kernels.layout import ThreeRegionLayout
from cogview_kernels.three_region_attention import launch_config, native
from cogview_kernels.three_region_attention.launch_config import Config

# Below every finite float32 score; -inf would make NaN of a row that has seen no key yet.
_LOWEST = tl.constexpr(-3.4028234663852886e38)

# ptxas runs matrix products one after the other (warning C7515) where the loop over G heads is known to turn
# once, as Triton would make it known for G = 1.
_NO_SPECIALIZATION = ["seed", "keep_threshold", "G"]

# Queries or keys of a tile, at most.
_LARGEST_TILE = 128


@triton.jit
def _index_kernel(
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


@triton.jit
def _softmax_step(
    acc, row_max, rest, total, s, factor, bias, v, columns, r0, r1, keep_threshold,
    IS_FLOAT32: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a tile of raw products ``s`` (-inf: not seen) to the running maximum, sum and output.

    The difference to the largest score of the tile comes first: ``s * factor - peak`` in one fused
    multiply-add would be off by what was rounded when the peak itself was computed, half an ulp of it: no
    harm below 2^22, but 2^2900 for the largest scores of float16. ``rest`` is what the maximum was rounded
    by; the backward needs it for the same reason."""
    top = tl.maximum(tl.max(s, axis=1), _LOWEST)  # of a row that sees no key here, -inf - -inf would be NaN
    peak = tl.fma(top, factor, bias)
    new_max = tl.maximum(row_max, peak)
    rest = tl.where(peak > row_max, tl.fma(top, factor, -peak) + bias, rest)
    p = tl.exp2(tl.fma(s - top[:, None], factor, (peak - new_max)[:, None]))
    shrink = tl.exp2(row_max - new_max)
    total = total * shrink + tl.sum(p, axis=1)
    if HAS_DROPOUT:
        p = tl.where(dropout_keeps(r0[:, None], r1[:, None], columns[None, :], keep_threshold), p, 0.0)
    if IS_FLOAT32:
        # The sum of the tile by itself, then added: one long chain of additions would err more.
        acc = tl.fma(acc, shrink[:, None], tl.dot(p, v, input_precision=PRECISION))
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, rest, total


@triton.jit(do_not_specialize=_NO_SPECIALIZATION)
def _fwd_kernel(
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
    row_max = tl.full([BLOCK_M], _LOWEST, tl.float32)
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
            acc, row_max, rest, total = _softmax_step(
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
        acc, row_max, rest, total = _softmax_step(
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


@triton.jit(do_not_specialize=_NO_SPECIALIZATION)
def _bwd_rows_kernel(
    out_ptr, dout_ptr, residuals_ptr, dlse_ptr, stats_ptr, words_ptr, seed,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, H, T, TP, peaks_at,
    TWO_PEAKS: tl.constexpr, HAS_DLSE: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of each row its two peaks and delta = sum_d out dout - dlse, ``[B, H, 3, TP]``, and the two words of
    its dropout, ``[B, H, 2, TP]``.

    Without TWO_PEAKS the first is lse in log2, and the second is not written: then the probabilities of
    scores above 2^22 are rough, as bfloat16 leaves such scores themselves, and dk and dv cost 5 % less.
    Rows from T to TP, the next multiple of a tile, have a peak of inf, hence p = 0, so that later loads need
    no mask. With one, and at 4 bytes a row, each thread would copy many single numbers into shared memory."""
    tiles = TP // BLOCK_M
    pid = tl.program_id(0)
    bh = pid // tiles
    b = bh // H
    h = bh % H
    rows = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < T
    out_ptr += offset(b, stride_ob) + offset(h, stride_oh)
    dout_ptr += offset(b, stride_gb) + offset(h, stride_gh)
    out = load_rows(out_ptr, rows, stride_ot, inside, D, BLOCK_D).to(tl.float32)
    dout = load_rows(dout_ptr, rows, stride_gt, inside, D, BLOCK_D).to(tl.float32)
    delta = tl.sum(out * dout, axis=1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + offset(bh, T) + rows, mask=inside, other=0.0)
    peaks_ptr = residuals_ptr + peaks_at + offset(bh, T) * 2 + rows
    peak = tl.load(peaks_ptr, mask=inside, other=0).to(tl.float32, bitcast=True)
    rest = tl.load(peaks_ptr + T, mask=inside, other=0).to(tl.float32, bitcast=True)
    stats_ptr += offset(bh, TP) * 3 + rows
    if TWO_PEAKS:
        tl.store(stats_ptr + TP, rest)
    else:
        peak += rest
    tl.store(stats_ptr, tl.where(inside, peak, float("inf")))
    tl.store(stats_ptr + 2 * TP, delta)
    if HAS_DROPOUT:
        r0, r1 = dropout_rows(seed, rows, h, b)
        words_ptr += offset(bh, TP) * 2 + rows
        tl.store(words_ptr, r0.to(tl.int32, bitcast=True))
        tl.store(words_ptr + TP, r1.to(tl.int32, bitcast=True))


@triton.jit
def _load_stats(stats_ptr, TP, bias, TWO_PEAKS: tl.constexpr):
    """The two peaks, less the bias of the keys, and delta, see :func:`_bwd_rows_kernel`."""
    peak = tl.load(stats_ptr)
    rest = peak
    if TWO_PEAKS:
        rest = tl.load(stats_ptr + TP) - bias
    else:
        peak -= bias
    return peak, rest, tl.load(stats_ptr + 2 * TP)


@triton.jit
def _load_words(words_ptr, TP):
    r0 = tl.load(words_ptr).to(tl.uint32, bitcast=True)
    r1 = tl.load(words_ptr + TP).to(tl.uint32, bitcast=True)
    return r0, r1


@triton.jit
def _probabilities(s, factor, peak, rest, TWO_PEAKS: tl.constexpr):
    """2^(s factor - peak - rest); the first difference is exact where it is small, however large the peak.

    Without TWO_PEAKS it is 2^(s factor - peak), whose exponent rounding could make large: it ends at 0."""
    exponent = tl.fma(s, factor, -peak)
    return tl.exp2(exponent - rest if TWO_PEAKS else tl.minimum(exponent, 0.0))


@triton.jit
def _dq_step(
    dq, dout, delta, peak, rest, s, factor, k, v, columns, r0, r1, keep_threshold, keep_scale,
    TWO_PEAKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds ds k for a tile of raw products ``s``; the bias was taken off the peaks."""
    p = _probabilities(s, factor, peak[:, None], rest[:, None], TWO_PEAKS)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        keeps = dropout_keeps(r0[:, None], r1[:, None], columns[None, :], keep_threshold)
        dp = tl.where(keeps, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=_NO_SPECIALIZATION)
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, residuals_ptr, stats_ptr, words_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    H, G, T, TP, PP, stride_i, block_size, window_blocks, scale, factor, bias, keep_threshold, keep_scale,
    HAS_FAR: tl.constexpr, TWO_PEAKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq = scale sum_j ds_j k_j;  ds = 2^(s - lse) (dp - delta),  dp_j = keep_j dout.v_j / (1 - p)."""
    tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (tiles - 1 - pid % tiles) * BLOCK_M
    bh = pid // tiles
    b = bh // H
    h = bh % H
    q_ptr += offset(b, stride_qb) + offset(h, stride_qh)
    dout_ptr += offset(b, stride_gb) + offset(h, stride_gh)
    k_ptr += offset(b, stride_kb) + offset(h // G, stride_kh)
    v_ptr += offset(b, stride_vb) + offset(h // G, stride_vh)
    rows = start_m + tl.arange(0, BLOCK_M)
    stop_m = tl.minimum(start_m + BLOCK_M, T)
    q = load_rows(q_ptr, rows, stride_qt, rows < T, D, BLOCK_D)
    dout = load_rows(dout_ptr, rows, stride_gt, rows < T, D, BLOCK_D)
    stats_ptr += offset(bh, TP) * 3 + rows
    peak, rest, delta = _load_stats(stats_ptr, TP, 0.0, TWO_PEAKS)
    r0, r1 = rows, rows
    if HAS_DROPOUT:
        r0, r1 = _load_words(words_ptr + offset(bh, TP) * 2 + rows, TP)

    first_window = window_start(start_m, block_size, window_blocks)
    last_window = window_start(stop_m - 1, block_size, window_blocks)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if HAS_FAR:
        index_ptr = residuals_ptr + offset(b, stride_i)
        far_counts_ptr = index_ptr + PP + T
        full = tl.load(far_counts_ptr + start_m // block_size)
        stop = tl.load(far_counts_ptr + (stop_m - 1) // block_size)
        far_peak, far_rest, _ = _load_stats(stats_ptr, TP, bias, TWO_PEAKS)
        for start in tl.range(0, stop, BLOCK_N, num_stages=2 * STAGES - 1):
            index = start + tl.arange(0, BLOCK_N)
            columns = tl.load(index_ptr + index)
            k = load_rows(k_ptr, columns, stride_kt, columns < T, D, BLOCK_D)
            v = load_rows(v_ptr, columns, stride_vt, columns < T, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if start + BLOCK_N > full:
                far_count = tl.load(far_counts_ptr + rows // block_size, mask=rows < T, other=0)
                s = tl.where(index[None, :] < far_count[:, None], s, float("-inf"))
            dq = _dq_step(
                dq, dout, delta, far_peak, far_rest, s, factor, k, v, columns, r0, r1,
                keep_threshold, keep_scale, TWO_PEAKS, HAS_DROPOUT, PRECISION,
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
        dq = _dq_step(
            dq, dout, delta, peak, rest, s, factor, k, v, columns, r0, r1, keep_threshold, keep_scale,
            TWO_PEAKS, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    d = tl.arange(0, BLOCK_D)
    dq_ptr += offset(b, stride_dqb) + offset(h, stride_dqh)
    inside = (rows < T)[:, None] & (d < D)[None, :]
    pointers = dq_ptr + offset(rows, stride_dqt)[:, None] + d[None, :]
    store_rounded(pointers, dq * scale, inside, dq_ptr.dtype.element_ty)


@triton.jit
def _key_gradients(
    q_ptr, dout_ptr, stats_ptr, words_ptr, k, v, columns, first, end,
    start_m, stop_m, full_lo, full_hi, b, kv_head,
    stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt,
    H, G, T, TP, factor, bias, keep_threshold, keep_scale,
    HAS_END: tl.constexpr, TWO_PEAKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(dk / scale, dv) of a tile of keys, over the queries ``start_m <= i < stop_m`` of its G query heads.

    Key j is seen by the queries from first(j) up to end(j) (all later ones without HAS_END); tiles within
    full_lo and full_hi need no mask.
    dv_j = sum_i keep p_ij dout_i / (1 - p);  dk_j = scale sum_i ds_ij q_i.
    """
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(G):
        h = kv_head * G + g
        q_head = q_ptr + offset(b, stride_qb) + offset(h, stride_qh)
        dout_head = dout_ptr + offset(b, stride_gb) + offset(h, stride_gh)
        bh = b * H + h
        for start in tl.range(start_m, stop_m, BLOCK_M, num_stages=STAGES):
            rows = start + tl.arange(0, BLOCK_M)
            q = load_rows(q_head, rows, stride_qt, rows < T, D, BLOCK_D)
            dout = load_rows(dout_head, rows, stride_gt, rows < T, D, BLOCK_D)
            peak, rest, delta = _load_stats(stats_ptr + offset(bh, TP) * 3 + rows, TP, bias, TWO_PEAKS)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            if (start < full_lo) | (start + BLOCK_M > full_hi):
                seen = rows[None, :] >= first[:, None]
                if HAS_END:
                    seen = seen & (rows[None, :] < end[:, None])
                s = tl.where(seen, s, float("-inf"))
            p = _probabilities(s, factor, peak[None, :], rest[None, :], TWO_PEAKS)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            kept = p
            if HAS_DROPOUT:
                r0, r1 = _load_words(words_ptr + offset(bh, TP) * 2 + rows, TP)
                keeps = dropout_keeps(r0[None, :], r1[None, :], columns[:, None], keep_threshold)
                kept = tl.where(keeps, p, 0.0)
                dp = tl.where(keeps, dp * keep_scale, 0.0)
            dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_NO_SPECIALIZATION)
def _dkv_far_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, residuals_ptr, stats_ptr, words_ptr, dk_far_ptr, dv_far_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt,
    H, G, T, TP, PP, stride_i, block_size, window_blocks, scale, factor, bias, keep_threshold, keep_scale,
    TWO_PEAKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk, dv of a tile of pivots as far keys, packed: ``[B, H / G, PP, D]``, in ascending order."""
    tiles = PP // BLOCK_N
    pid = tl.program_id(0)
    # The first pivots are far from the most queries: they start first.
    index = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    heads = H // G
    b = pid // tiles // heads
    kv_head = pid // tiles % heads
    columns = tl.load(residuals_ptr + offset(b, stride_i) + index)
    k_ptr += offset(b, stride_kb) + offset(kv_head, stride_kh)
    v_ptr += offset(b, stride_vb) + offset(kv_head, stride_vh)
    k = load_rows(k_ptr, columns, stride_kt, columns < T, D, BLOCK_D)
    v = load_rows(v_ptr, columns, stride_vt, columns < T, D, BLOCK_D)

    first = first_query_past(columns, block_size, window_blocks)
    start_m = tl.min(first, axis=0) // BLOCK_M * BLOCK_M
    # Pads count nowhere and are not stored, so they need no mask.
    full_lo = tl.max(tl.where(columns < T, first, 0), axis=0)
    dk, dv = _key_gradients(
        q_ptr, dout_ptr, stats_ptr, words_ptr, k, v, columns, first, first,
        start_m, T, full_lo, T + BLOCK_M, b, kv_head,
        stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt,
        H, G, T, TP, factor, bias, keep_threshold, keep_scale,
        False, TWO_PEAKS, HAS_DROPOUT, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    if HAS_DROPOUT:
        dv *= keep_scale
    d = tl.arange(0, BLOCK_D)
    inside = (columns < T)[:, None] & (d < D)[None, :]
    at = offset(pid // tiles, PP) * D + offset(index, D)[:, None] + d[None, :]
    store_rounded(dk_far_ptr + at, dk * scale, inside, dk_far_ptr.dtype.element_ty)
    store_rounded(dv_far_ptr + at, dv, inside, dv_far_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=_NO_SPECIALIZATION)
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, residuals_ptr, stats_ptr, words_ptr, dk_far_ptr, dv_far_ptr,
    dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    H, G, T, TP, PP, stride_i, block_size, window_blocks, scale, factor, keep_threshold, keep_scale,
    HAS_FAR: tl.constexpr, TWO_PEAKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk, dv of a tile of keys over the queries whose window has them, plus the packed part of pivots."""
    tiles = tl.cdiv(T, BLOCK_N)
    pid = tl.program_id(0)
    start_n = pid % tiles * BLOCK_N
    columns = start_n + tl.arange(0, BLOCK_N)
    stop_n = tl.minimum(start_n + BLOCK_N, T)
    heads = H // G
    b = pid // tiles // heads
    kv_head = pid // tiles % heads
    k_ptr += offset(b, stride_kb) + offset(kv_head, stride_kh)
    v_ptr += offset(b, stride_vb) + offset(kv_head, stride_vh)
    k = load_rows(k_ptr, columns, stride_kt, columns < T, D, BLOCK_D)
    v = load_rows(v_ptr, columns, stride_vt, columns < T, D, BLOCK_D)

    start_m = start_n // BLOCK_M * BLOCK_M
    stop_m = tl.minimum(first_query_past(stop_n - 1, block_size, window_blocks), T)
    dk, dv = _key_gradients(
        q_ptr, dout_ptr, stats_ptr, words_ptr, k, v, columns,
        columns, first_query_past(columns, block_size, window_blocks),
        start_m, stop_m, stop_n - 1, first_query_past(start_n, block_size, window_blocks), b, kv_head,
        stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt,
        H, G, T, TP, factor, 0.0, keep_threshold, keep_scale,
        True, TWO_PEAKS, HAS_DROPOUT, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    dk *= scale
    if HAS_DROPOUT:
        dv *= keep_scale
    d = tl.arange(0, BLOCK_D)
    inside = (columns < T)[:, None] & (d < D)[None, :]
    if HAS_FAR:
        rank = tl.load(residuals_ptr + offset(b, stride_i) + PP + columns, mask=columns < T, other=-1)
        far = inside & (rank >= 0)[:, None]
        at = offset(pid // tiles, PP) * D + offset(rank, D)[:, None] + d[None, :]
        dk += tl.load(dk_far_ptr + at, mask=far, other=0.0).to(tl.float32)
        dv += tl.load(dv_far_ptr + at, mask=far, other=0.0).to(tl.float32)
    dk_ptr += offset(b, stride_dkb) + offset(kv_head, stride_dkh)
    dv_ptr += offset(b, stride_dvb) + offset(kv_head, stride_dvh)
    dk_pointers = dk_ptr + offset(columns, stride_dkt)[:, None] + d[None, :]
    dv_pointers = dv_ptr + offset(columns, stride_dvt)[:, None] + d[None, :]
    store_rounded(dk_pointers, dk, inside, dk_ptr.dtype.element_ty)
    store_rounded(dv_pointers, dv, inside, dv_ptr.dtype.element_ty)


def _whole_tiles(n: int) -> int:
    return (n + _LARGEST_TILE - 1) // _LARGEST_TILE * _LARGEST_TILE


class _Sizes:
    """What both directions work out from shapes and layout. ``stride_i``: integers of a sample's index."""

    def __init__(self, q: Tensor, k: Tensor, layout: ThreeRegionLayout) -> None:
        self.B, self.H, self.T, self.D = q.shape
        self.heads = k.shape[1]
        self.G = self.H // self.heads
        self.P = layout.pivots.shape[1]
        # Block size and window blocks as short as makes no difference at T positions.
        self.block_size = min(layout.block_size, self.T)
        self.blocks = triton.cdiv(self.T, self.block_size)
        self.window_blocks = min(layout.window_blocks, self.blocks)
        self.TP, self.PP = _whole_tiles(self.T), _whole_tiles(self.P)
        self.stride_i = _stride_of_index(self.T, self.P, layout.block_size, layout.window_blocks)
        self.has_far = self.stride_i > 0
        self.peaks_at = self.B * self.stride_i


def _stride_of_index(T: int, P: int, block_size: int, window_blocks: int) -> int:
    """Integers of a sample in :func:`_index_kernel`, whole multiples of 64 bytes, so that nothing starts in
    the middle of a vector; 0 where no key is far."""
    if P == 0 or block_size * window_blocks >= T:
        return 0
    return (_whole_tiles(P) + T + (T - 1) // block_size + 16) // 16 * 16


def residuals_size(q: Tensor, pivots: Tensor, block_size: int, window_blocks: int) -> int:
    """How many int32 the forward leaves for the backward besides out and lse: the index of the pivots, see
    :func:`_index_kernel`, then the bits of both peaks of each row, see :func:`_fwd_kernel`."""
    B, H, T, _ = q.shape
    return B * (_stride_of_index(T, pivots.shape[1], block_size, window_blocks) + 2 * H * T)


def _tiles(config: Config) -> dict[str, int | None]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "STAGES": config.stages,
        "maxnreg": config.maxnreg,
    }


def _is_tf32(q: Tensor) -> bool:
    """PyTorch's own switch decides whether products of float32 may use tf32."""
    return q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _flags(q: Tensor, dropout: Dropout | None) -> dict[str, Any]:
    return {
        "HAS_DROPOUT": dropout is not None,
        "PRECISION": "tf32" if _is_tf32(q) else "ieee",
        "D": q.shape[3],
        "BLOCK_D": launch_config.padded(q.shape[3]),
    }


def _chosen(
    kernel: str, q: Tensor, sizes: _Sizes, dropout: Dropout | None, launch: Callable[[Config], Launch],
    arguments: Callable[[Launch], None],
) -> Launch:  # fmt: skip
    """``launch`` at the configuration that suits; ``arguments`` runs one, should it have to be timed."""
    made: dict[Config, Launch] = {}

    def run(config: Config) -> None:
        if config not in made:
            made[config] = launch(config)
        arguments(made[config])

    dropped = dropout is not None
    return launch(launch_config.choose(kernel, q.device, sizes.D, q.dtype, sizes.block_size, dropped, run))


def limit(backend: str, q: Tensor) -> str:
    """Why the kernels cannot take ``q``, and the way out; empty when they can."""
    return native.limit(backend, q)


def _key(
    q: Tensor, k: Tensor, v: Tensor, layout: ThreeRegionLayout, scale: float, dropout: Dropout | None
) -> tuple[Any, ...]:
    """What both plans look at."""
    pivots = layout.pivots
    return (
        q.dtype, q.get_device(), q.shape, k.shape, q.stride(), k.stride(), v.stride(), scale,
        pivots.shape, pivots.dtype, layout.block_size, layout.window_blocks, layout.pivot_bias,
        dropout and dropout.keep_threshold, _is_tf32(q), launch_config.choose,
    )  # fmt: skip


def _index_launch(sizes: _Sizes) -> Launch:
    numbers = (sizes.P, sizes.PP, sizes.T, sizes.stride_i, sizes.block_size, sizes.window_blocks)
    return Launch(_index_kernel, (sizes.B,), numbers, BLOCK=1024, num_warps=8)


class _Forward(NamedTuple):
    sort: Launch | None
    fwd: Launch


def _plan_forward(q, k, v, layout, scale, dropout, out, lse, residuals) -> _Forward:
    sizes = _Sizes(q, k, layout)
    seed, keep_threshold, keep_scale = dropout_arguments(dropout)
    sort = _index_launch(sizes) if sizes.has_far else None
    if sort is not None:  # tuning launches the kernel on what it leaves
        sort(layout.pivots.contiguous(), residuals)

    def fwd(config: Config) -> Launch:
        numbers = (
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            sizes.H, sizes.G, sizes.T, sizes.PP, sizes.stride_i, sizes.peaks_at,
            sizes.block_size, sizes.window_blocks,
            _factor(scale), layout.pivot_bias * LOG2E.value, keep_threshold, keep_scale,
        )  # fmt: skip
        grid = (triton.cdiv(sizes.T, config.block_m) * sizes.B * sizes.H,)
        return Launch(
            _fwd_kernel, grid, numbers, HAS_FAR=sizes.has_far, **_flags(q, dropout), **_tiles(config)
        )

    tensors = (q, k, v, residuals, out, lse)
    return _Forward(sort, _chosen("fwd", q, sizes, dropout, fwd, lambda launch: launch(*tensors, seed=seed)))


_forward_plans: Plans[_Forward] = Plans(_plan_forward)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    scale: float,
    dropout: Dropout | None,
    out: Tensor,
    lse: Tensor,
    residuals: Tensor,
    _: str,
) -> None:
    """Fills ``out``, ``lse`` and ``residuals``. Rows are contiguous. Two launches; one if no key is far."""
    if scale < 0:
        q, scale = -q, -scale
    key = (_key(q, k, v, layout, scale, dropout), out.stride())
    plan = _forward_plans.get(key, q, k, v, layout, scale, dropout, out, lse, residuals)
    if plan.sort is not None:
        plan.sort(layout.pivots.contiguous(), residuals)
    plan.fwd(q, k, v, residuals, out, lse, seed=dropout_arguments(dropout)[0])


class _Backward(NamedTuple):
    """The launches, the shapes of what they share (:func:`_bwd_rows_kernel`) and of the far gradients."""

    rows: Launch
    dq: Launch
    dkv_far: Launch | None
    dkv: Launch
    stats_shape: tuple[int, ...]
    words_shape: tuple[int, ...]
    far_shape: tuple[int, ...]


def _plan_backward(q, k, v, layout, scale, dq_scale, dropout, saved, doutputs, gradients) -> _Backward:
    (out, lse, residuals), (dout, dlse), (dq, dk, dv) = saved, doutputs, gradients
    sizes = _Sizes(q, k, layout)
    B, H, T, D = q.shape
    seed, keep_threshold, keep_scale = dropout_arguments(dropout)
    factor, bias = _factor(scale), layout.pivot_bias * LOG2E.value
    flags = _flags(q, dropout) | {"TWO_PEAKS": q.dtype != torch.bfloat16}
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    common = (sizes.H, sizes.G, T, sizes.TP, sizes.PP, sizes.stride_i, sizes.block_size, sizes.window_blocks)

    block = 64
    rows = Launch(
        _bwd_rows_kernel,
        (sizes.TP // block * B * H,),
        (*out.stride()[:3], *dout.stride()[:3], H, T, sizes.TP, sizes.peaks_at),
        TWO_PEAKS=flags["TWO_PEAKS"], HAS_DLSE=dlse is not None, HAS_DROPOUT=dropout is not None,
        D=D, BLOCK_D=flags["BLOCK_D"], BLOCK_M=block,
    )  # fmt: skip

    def dq_launch(config: Config) -> Launch:
        numbers = (*inputs, *dq.stride()[:3], *common, dq_scale, factor, bias, keep_threshold, keep_scale)
        grid = (triton.cdiv(T, config.block_m) * B * H,)
        return Launch(_dq_kernel, grid, numbers, HAS_FAR=sizes.has_far, **flags, **_tiles(config))

    def dkv_far_launch(config: Config) -> Launch:
        numbers = (*inputs, *common, scale, factor, bias, keep_threshold, keep_scale)
        grid = (sizes.PP // config.block_n * B * sizes.heads,)
        return Launch(_dkv_far_kernel, grid, numbers, **flags, **_tiles(config))

    def dkv_launch(config: Config) -> Launch:
        numbers = (
            *inputs, *dk.stride()[:3], *dv.stride()[:3], *common, scale, factor, keep_threshold, keep_scale
        )  # fmt: skip
        grid = (triton.cdiv(T, config.block_n) * B * sizes.heads,)
        return Launch(_dkv_kernel, grid, numbers, HAS_FAR=sizes.has_far, **flags, **_tiles(config))

    stats_shape, words_shape, far_shape = (
        (B, H, 3, sizes.TP),
        (B, H, 2, sizes.TP),
        (2, B, sizes.heads, sizes.PP, D),
    )
    # What tuning launches the kernels on.
    stats, words = _empty_stats(lse, stats_shape, words_shape, dropout)
    far = k.new_empty(far_shape if sizes.has_far else (2, 0))
    rows(out, dout, residuals, lse if dlse is None else dlse, stats, words, seed=seed)
    before = (q, k, v, dout, residuals, stats, words)
    return _Backward(
        rows,
        _chosen("dq", q, sizes, dropout, dq_launch, lambda launch: launch(*before, dq)),
        _chosen("dkv_far", q, sizes, dropout, dkv_far_launch, lambda launch: launch(*before, *far))
        if sizes.has_far
        else None,
        _chosen("dkv", q, sizes, dropout, dkv_launch, lambda launch: launch(*before, *far, dk, dv)),
        stats_shape,
        words_shape,
        tuple(far.shape),
    )


def _empty_stats(
    lse: Tensor, stats_shape: tuple[int, ...], words_shape: tuple[int, ...], dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    stats = lse.new_empty(stats_shape)
    return stats, stats if dropout is None else lse.new_empty(words_shape, dtype=torch.int32)


_backward_plans: Plans[_Backward] = Plans(_plan_backward)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    scale: float,
    dropout: Dropout | None,
    saved: tuple[Tensor, Tensor, Tensor],
    doutputs: tuple[Tensor, Tensor | None],
    gradients: tuple[Tensor, Tensor, Tensor],
    _: str,
) -> None:
    """Fills ``gradients``, of q, k and v. ``saved``: out, lse and residuals; ``doutputs``: of out and lse.

    Rows are contiguous. Four launches, three where no key is far."""
    (out, lse, residuals), (dout, dlse), (dq, dk, dv) = saved, doutputs, gradients
    dq_scale = scale
    if scale < 0:
        # Scores stay what they were; dq belongs to -q, and its sign is turned back by dq_scale.
        q, scale = -q, -scale
    key = (
        _key(q, k, v, layout, scale, dropout), dq_scale, dlse is None,
        out.stride(), dout.stride(), dq.stride(), dk.stride(), dv.stride(),
    )  # fmt: skip
    plan = _backward_plans.get(key, q, k, v, layout, scale, dq_scale, dropout, saved, doutputs, gradients)
    stats, words = _empty_stats(lse, plan.stats_shape, plan.words_shape, dropout)
    dk_far, dv_far = k.new_empty(plan.far_shape).unbind()
    plan.rows(
        out, dout, residuals, lse if dlse is None else dlse, stats, words, seed=dropout_arguments(dropout)[0]
    )
    before = (q, k, v, dout, residuals, stats, words)
    plan.dq(*before, dq)
    if plan.dkv_far is not None:
        plan.dkv_far(*before, dk_far, dv_far)
    plan.dkv(*before, dk_far, dv_far, dk, dv)


def _factor(scale: float) -> float:
    """scale * log2(e); 0 becomes the least normal number, since a masked score of -inf times 0 is NaN."""
    return max(scale * LOG2E.value, torch.finfo(torch.float32).tiny)
