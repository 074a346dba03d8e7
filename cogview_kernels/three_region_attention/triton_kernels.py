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
from typing import Any

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
    pivots_ptr, sorted_pivots_ptr, far_counts_ptr, rank_of_pivot_ptr, P, PP, T, NB, block_size, window_blocks,
    HAS_RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sorts by counting, PP^2 comparisons a sample: ``sorted_pivots[rank] = pivot`` with pads as T up to PP.

    ``far_counts[block]``: pivots left of the window of ``block``. ``rank_of_pivot[pivot] = rank``."""
    b = tl.program_id(1)
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_ptr = pivots_ptr + offset(b, P)
    pivot = tl.load(row_ptr + mine, mask=mine < P, other=-1).to(tl.int32)
    pivot = tl.where((pivot < 0) | (pivot >= T), T, pivot)
    start_of_mine = window_start_of_block(mine, block_size, window_blocks)
    rank = tl.zeros([BLOCK], tl.int32)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, PP, BLOCK):
        index = start + tl.arange(0, BLOCK)
        other = tl.load(row_ptr + index, mask=index < P, other=-1).to(tl.int32)
        other = tl.where((other < 0) | (other >= T), T, other)
        # Equal ones (pads, or pivots wrongly given twice) keep their order, so that every rank is taken.
        less = other[None, :] < pivot[:, None]
        less = less | ((other[None, :] == pivot[:, None]) & (index[None, :] < mine[:, None]))
        rank += tl.sum(less.to(tl.int32), axis=1)
        before += tl.sum((other[None, :] < start_of_mine[:, None]).to(tl.int32), axis=1)
    tl.store(sorted_pivots_ptr + offset(b, PP) + rank, pivot, mask=mine < PP)
    tl.store(far_counts_ptr + offset(b, NB) + mine, before, mask=mine < NB)
    if HAS_RANKS:
        tl.store(rank_of_pivot_ptr + offset(b, T) + pivot, rank, mask=pivot < T)


@triton.jit
def _softmax_step(
    acc, row_max, total, s, factor, bias, v, columns, r0, r1, keep_threshold,
    HUGE_SCORES: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a tile of raw products ``s`` (-inf: not seen) to the running maximum, sum and output.

    One fused multiply-add rounds ``s * factor - peak`` once, while the peak itself was rounded as a product:
    for the largest key the exponent is then off by up to half an ulp of the peak, which is no harm below
    2^22 but 2^2900 and more for the largest scores of float16. With HUGE_SCORES the difference to the largest
    score of the tile comes first: it is exactly 0 there, at the price of one more addition an element."""
    top = tl.max(s, axis=1)
    if HUGE_SCORES:
        top = tl.maximum(top, _LOWEST)  # of a row that sees no key here, -inf - -inf would be NaN
    peak = top * factor + bias
    new_max = tl.maximum(row_max, peak)
    if HUGE_SCORES:
        p = tl.exp2(tl.fma(s - top[:, None], factor, (peak - new_max)[:, None]))
    else:
        p = tl.exp2(tl.fma(s, factor, (bias - new_max)[:, None]))
    shrink = tl.exp2(row_max - new_max)
    total = total * shrink + tl.sum(p, axis=1)
    if HAS_DROPOUT:
        p = tl.where(dropout_keeps(r0[:, None], r1[:, None], columns[None, :], keep_threshold), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, total


@triton.jit(do_not_specialize=_NO_SPECIALIZATION)
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, sorted_pivots_ptr, far_counts_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    H, G, T, PP, NB, block_size, window_blocks, factor, bias, seed, keep_threshold, keep_scale,
    HAS_FAR: tl.constexpr, HUGE_SCORES: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = sum_j 2^(s_j - m) keep_j v_j / (1 - p) / sum_j 2^(s_j - m);  lse = ln(sum_j 2^s_j)."""
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
    total = tl.zeros([BLOCK_M], tl.float32)

    if HAS_FAR:
        full = tl.load(far_counts_ptr + offset(b, NB) + start_m // block_size)
        stop = tl.load(far_counts_ptr + offset(b, NB) + (stop_m - 1) // block_size)
        sorted_pivots_ptr += offset(b, PP)
        for start in tl.range(0, stop, BLOCK_N, num_stages=2 * STAGES - 1):
            index = start + tl.arange(0, BLOCK_N)
            columns = tl.load(sorted_pivots_ptr + index)
            k = load_rows(k_ptr, columns, stride_kt, columns < T, D, BLOCK_D)
            v = load_rows(v_ptr, columns, stride_vt, columns < T, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if start + BLOCK_N > full:
                far_count = tl.load(
                    far_counts_ptr + offset(b, NB) + rows // block_size, mask=rows < T, other=0
                )
                s = tl.where(index[None, :] < far_count[:, None], s, float("-inf"))
            acc, row_max, total = _softmax_step(
                acc, row_max, total, s, factor, bias, v, columns, r0, r1, keep_threshold,
                HUGE_SCORES, HAS_DROPOUT, PRECISION,
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
        acc, row_max, total = _softmax_step(
            acc, row_max, total, s, factor, 0.0, v, columns, r0, r1, keep_threshold,
            HUGE_SCORES, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    tl.store(lse_ptr + offset(bh, T) + rows, (row_max + tl.log2(total)) * LN2, mask=rows < T)
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
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, stats_ptr, words_ptr,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, H, T, TP, seed,
    HAS_DLSE: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of each row lse in log2 and delta = sum_d out dout - dlse, and the dropout's words: ``[B, H, 2, TP]``.

    Rows from T to TP, the next multiple of a tile, have lse = inf, hence p = 0, so that later loads need no
    mask. With one, and at 4 bytes a row, each thread would copy many single numbers into shared memory."""
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
    at = offset(bh, T) + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at, mask=inside, other=0.0)
    at_padded = offset(bh, TP) * 2 + rows
    tl.store(stats_ptr + at_padded, tl.load(lse_ptr + at, mask=inside, other=float("inf")) * LOG2E)
    tl.store(stats_ptr + TP + at_padded, delta)
    if HAS_DROPOUT:
        r0, r1 = dropout_rows(seed, rows, h, b)
        tl.store(words_ptr + at_padded, r0.to(tl.int32, bitcast=True))
        tl.store(words_ptr + TP + at_padded, r1.to(tl.int32, bitcast=True))


@triton.jit
def _load_words(words_ptr, TP):
    r0 = tl.load(words_ptr).to(tl.uint32, bitcast=True)
    r1 = tl.load(words_ptr + TP).to(tl.uint32, bitcast=True)
    return r0, r1


@triton.jit
def _probabilities(s, factor, lse2, HUGE_SCORES: tl.constexpr):
    """2^(s factor - lse2); where scores are huge, rounding alone can make the exponent large: at most 0."""
    exponent = tl.fma(s, factor, -lse2)
    if HUGE_SCORES:
        exponent = tl.minimum(exponent, 0.0)
    return tl.exp2(exponent)


@triton.jit
def _dq_step(
    dq, dout, delta, lse2, s, factor, k, v, columns, r0, r1, keep_threshold, keep_scale,
    HUGE_SCORES: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds ds k for a tile of raw products ``s``; ``lse2`` is in log2, less the bias."""
    p = _probabilities(s, factor, lse2[:, None], HUGE_SCORES)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        keeps = dropout_keeps(r0[:, None], r1[:, None], columns[None, :], keep_threshold)
        dp = tl.where(keeps, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=_NO_SPECIALIZATION)
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, sorted_pivots_ptr, far_counts_ptr, stats_ptr, words_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    H, G, T, TP, PP, NB, block_size, window_blocks, scale, factor, bias, keep_threshold, keep_scale,
    HAS_FAR: tl.constexpr, HUGE_SCORES: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
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
    at = offset(bh, TP) * 2 + rows
    lse2 = tl.load(stats_ptr + at)
    delta = tl.load(stats_ptr + TP + at)
    r0, r1 = rows, rows
    if HAS_DROPOUT:
        r0, r1 = _load_words(words_ptr + at, TP)

    first_window = window_start(start_m, block_size, window_blocks)
    last_window = window_start(stop_m - 1, block_size, window_blocks)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if HAS_FAR:
        full = tl.load(far_counts_ptr + offset(b, NB) + start_m // block_size)
        stop = tl.load(far_counts_ptr + offset(b, NB) + (stop_m - 1) // block_size)
        sorted_pivots_ptr += offset(b, PP)
        far_lse2 = lse2 - bias
        for start in tl.range(0, stop, BLOCK_N, num_stages=2 * STAGES - 1):
            index = start + tl.arange(0, BLOCK_N)
            columns = tl.load(sorted_pivots_ptr + index)
            k = load_rows(k_ptr, columns, stride_kt, columns < T, D, BLOCK_D)
            v = load_rows(v_ptr, columns, stride_vt, columns < T, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if start + BLOCK_N > full:
                far_count = tl.load(
                    far_counts_ptr + offset(b, NB) + rows // block_size, mask=rows < T, other=0
                )
                s = tl.where(index[None, :] < far_count[:, None], s, float("-inf"))
            dq = _dq_step(
                dq, dout, delta, far_lse2, s, factor, k, v, columns, r0, r1, keep_threshold, keep_scale,
                HUGE_SCORES, HAS_DROPOUT, PRECISION,
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
            dq, dout, delta, lse2, s, factor, k, v, columns, r0, r1, keep_threshold, keep_scale,
            HUGE_SCORES, HAS_DROPOUT, PRECISION,
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
    HAS_END: tl.constexpr, HUGE_SCORES: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
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
        row_base = offset(b * H + h, TP) * 2
        for start in tl.range(start_m, stop_m, BLOCK_M, num_stages=STAGES):
            rows = start + tl.arange(0, BLOCK_M)
            q = load_rows(q_head, rows, stride_qt, rows < T, D, BLOCK_D)
            dout = load_rows(dout_head, rows, stride_gt, rows < T, D, BLOCK_D)
            lse2 = tl.load(stats_ptr + row_base + rows)
            delta = tl.load(stats_ptr + row_base + TP + rows)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            if (start < full_lo) | (start + BLOCK_M > full_hi):
                seen = rows[None, :] >= first[:, None]
                if HAS_END:
                    seen = seen & (rows[None, :] < end[:, None])
                s = tl.where(seen, s, float("-inf"))
            p = _probabilities(s, factor, (lse2 - bias)[None, :], HUGE_SCORES)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            kept = p
            if HAS_DROPOUT:
                r0, r1 = _load_words(words_ptr + row_base + rows, TP)
                keeps = dropout_keeps(r0[None, :], r1[None, :], columns[:, None], keep_threshold)
                kept = tl.where(keeps, p, 0.0)
                dp = tl.where(keeps, dp * keep_scale, 0.0)
            dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_NO_SPECIALIZATION)
def _dkv_far_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, sorted_pivots_ptr, stats_ptr, words_ptr, dk_far_ptr, dv_far_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt,
    H, G, T, TP, PP, block_size, window_blocks, scale, factor, bias, keep_threshold, keep_scale,
    HUGE_SCORES: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
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
    columns = tl.load(sorted_pivots_ptr + offset(b, PP) + index)
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
        False, HUGE_SCORES, HAS_DROPOUT, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N, STAGES,
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
    q_ptr, k_ptr, v_ptr, dout_ptr, rank_of_pivot_ptr, stats_ptr, words_ptr, dk_far_ptr, dv_far_ptr,
    dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    H, G, T, TP, PP, block_size, window_blocks, scale, factor, keep_threshold, keep_scale,
    HAS_FAR: tl.constexpr, HUGE_SCORES: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
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
        True, HUGE_SCORES, HAS_DROPOUT, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    dk *= scale
    if HAS_DROPOUT:
        dv *= keep_scale
    d = tl.arange(0, BLOCK_D)
    inside = (columns < T)[:, None] & (d < D)[None, :]
    if HAS_FAR:
        rank = tl.load(rank_of_pivot_ptr + offset(b, T) + columns, mask=columns < T, other=-1)
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
    return triton.cdiv(n, _LARGEST_TILE) * _LARGEST_TILE


def _index(
    pivots: Tensor, T: int, block_size: int, window_blocks: int, with_ranks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted pivots ``[B, PP]``, how many are far from each block ``[B, NB]`` and, for the backward, the rank
    of each pivot ``[B, T]``, -1 for other positions."""
    B, P = pivots.shape
    blocks, PP = triton.cdiv(T, block_size), _whole_tiles(P)
    sorted_pivots = pivots.new_empty(B, PP, dtype=torch.int32)
    far_counts = pivots.new_empty(B, blocks, dtype=torch.int32)
    rank_of_pivot = pivots.new_full((B, T), -1, dtype=torch.int32) if with_ranks else sorted_pivots
    block = 64
    _index_kernel[(triton.cdiv(max(PP, blocks), block), B)](
        pivots.contiguous(), sorted_pivots, far_counts, rank_of_pivot, P, PP, T, blocks,
        block_size, window_blocks, HAS_RANKS=with_ranks, BLOCK=block,
    )  # fmt: skip
    return sorted_pivots, far_counts, rank_of_pivot


def _window(layout: ThreeRegionLayout, T: int) -> tuple[int, int]:
    """Block size and window blocks, as short as makes no difference at T positions."""
    block_size = min(layout.block_size, T)
    return block_size, min(layout.window_blocks, triton.cdiv(T, block_size))


def _run(
    kernel: str, q: Tensor, block_size: int, dropout: Dropout | None, launch: Callable[[Config], None]
) -> None:
    chosen = launch_config.choose(
        kernel, q.device, q.shape[3], q.dtype, block_size, dropout is not None, launch
    )
    launch(chosen)


def _tiles(config: Config) -> dict[str, int | None]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "STAGES": config.stages,
        "maxnreg": config.maxnreg,
    }


def _flags(q: Tensor, dropout: Dropout | None) -> dict[str, Any]:
    # PyTorch's own switch decides whether products of float32 may use tf32.
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "HUGE_SCORES": True,
        "HAS_DROPOUT": dropout is not None,
        "PRECISION": "tf32" if tf32 else "ieee",
        "D": q.shape[3],
        "BLOCK_D": launch_config.padded(q.shape[3]),
    }


def limit(backend: str, q: Tensor) -> str:
    """Why the kernels cannot take ``q``, and the way out; empty when they can."""
    return native.limit(backend, q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    scale: float,
    dropout: Dropout | None,
    out: Tensor,
    lse: Tensor,
    _: str,
) -> None:
    """Fills ``out`` and ``lse``. Rows are contiguous. Two launches, one where there is no far key."""
    if scale < 0:
        q, scale = -q, -scale
    B, H, T, _D = q.shape
    block_size, window_blocks = _window(layout, T)
    PP, blocks, G = _whole_tiles(layout.pivots.shape[1]), triton.cdiv(T, block_size), H // k.shape[1]
    has_far = PP > 0 and blocks > window_blocks
    sorted_pivots, far_counts, _ranks = (
        _index(layout.pivots, T, block_size, window_blocks, False) if has_far else (lse, lse, lse)
    )
    seed, keep_threshold, keep_scale = dropout_arguments(dropout)

    def launch(config: Config) -> None:
        _fwd_kernel[(triton.cdiv(T, config.block_m) * B * H,)](
            q, k, v, sorted_pivots, far_counts, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            H, G, T, PP, blocks, block_size, window_blocks, _factor(scale), layout.pivot_bias * LOG2E.value,
            seed, keep_threshold, keep_scale,
            HAS_FAR=has_far, **_flags(q, dropout), **_tiles(config),
        )  # fmt: skip

    _run("fwd", q, block_size, dropout, launch)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    scale: float,
    dropout: Dropout | None,
    saved: tuple[Tensor, Tensor],
    doutputs: tuple[Tensor, Tensor | None],
    gradients: tuple[Tensor, Tensor, Tensor],
    _: str,
) -> None:
    """Fills ``gradients``, of q, k and v. ``saved`` and ``doutputs``: of out and lse. Rows are contiguous."""
    (out, lse), (dout, dlse), (dq, dk, dv) = saved, doutputs, gradients
    if scale < 0:
        # Scores stay what they were; dq belongs to -q, and its sign is turned back by the factor below.
        q, scale, dq_scale = -q, -scale, scale
    else:
        dq_scale = scale
    B, H, T, D = q.shape
    block_size, window_blocks = _window(layout, T)
    TP, PP, blocks = _whole_tiles(T), _whole_tiles(layout.pivots.shape[1]), triton.cdiv(T, block_size)
    heads = k.shape[1]
    G = H // heads
    has_far = PP > 0 and blocks > window_blocks
    sorted_pivots, far_counts, rank_of_pivot = (
        _index(layout.pivots, T, block_size, window_blocks, True) if has_far else (lse, lse, lse)
    )
    seed, keep_threshold, keep_scale = dropout_arguments(dropout)
    factor, bias, flags = _factor(scale), layout.pivot_bias * LOG2E.value, _flags(q, dropout)
    q_strides, k_strides, v_strides = q.stride()[:3], k.stride()[:3], v.stride()[:3]
    dout_strides = dout.stride()[:3]

    block = 64
    stats = lse.new_empty(B, H, 2, TP)
    words = stats.new_empty(stats.shape, dtype=torch.int32) if dropout is not None else stats
    _bwd_rows_kernel[(TP // block * B * H,)](
        out, dout, lse, lse if dlse is None else dlse, stats, words,
        *out.stride()[:3], *dout_strides, H, T, TP, seed,
        HAS_DLSE=dlse is not None, HAS_DROPOUT=dropout is not None,
        D=D, BLOCK_D=flags["BLOCK_D"], BLOCK_M=block,
    )  # fmt: skip

    def launch_dq(config: Config) -> None:
        _dq_kernel[(triton.cdiv(T, config.block_m) * B * H,)](
            q, k, v, dout, sorted_pivots, far_counts, stats, words, dq,
            *q_strides, *k_strides, *v_strides, *dout_strides, *dq.stride()[:3],
            H, G, T, TP, PP, blocks, block_size, window_blocks,
            dq_scale, factor, bias, keep_threshold, keep_scale,
            HAS_FAR=has_far, **flags, **_tiles(config),
        )  # fmt: skip

    _run("dq", q, block_size, dropout, launch_dq)

    dk_far = dv_far = lse
    if has_far:
        dk_far, dv_far = k.new_empty(2, B, heads, PP, D).unbind()

        def launch_dkv_far(config: Config) -> None:
            _dkv_far_kernel[(PP // config.block_n * B * heads,)](
                q, k, v, dout, sorted_pivots, stats, words, dk_far, dv_far,
                *q_strides, *k_strides, *v_strides, *dout_strides,
                H, G, T, TP, PP, block_size, window_blocks, scale, factor, bias, keep_threshold, keep_scale,
                **flags, **_tiles(config),
            )  # fmt: skip

        _run("dkv_far", q, block_size, dropout, launch_dkv_far)

    def launch_dkv(config: Config) -> None:
        _dkv_kernel[(triton.cdiv(T, config.block_n) * B * heads,)](
            q, k, v, dout, rank_of_pivot, stats, words, dk_far, dv_far, dk, dv,
            *q_strides, *k_strides, *v_strides, *dout_strides, *dk.stride()[:3], *dv.stride()[:3],
            H, G, T, TP, PP, block_size, window_blocks, scale, factor, keep_threshold, keep_scale,
            HAS_FAR=has_far, **flags, **_tiles(config),
        )  # fmt: skip

    _run("dkv", q, block_size, dropout, launch_dkv)


def _factor(scale: float) -> float:
    """scale * log2(e); 0 becomes the least normal number, since a masked score of -inf times 0 is NaN."""
    return max(scale * LOG2E.value, torch.finfo(torch.float32).tiny)
