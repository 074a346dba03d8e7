# SPDX-License-Identifier: Apache-2.0
"""The kernels of the backward of three-region attention.

Letters, the order of keys, bytes and FLOPs: see ``triton_kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cogview_kernels._attention_triton import NO_SPECIALIZATION, dq_step, probabilities
from cogview_kernels._regions_triton import (
    first_query_past,
    load_origin,
    tile_before,
    window_start,
    window_stop,
)
from cogview_kernels._triton import dropout_keeps, dropout_rows, load_rows, offset, store_rounded
from cogview_kernels.three_region_attention.index_triton import far_range, sees_far


@triton.jit(do_not_specialize=NO_SPECIALIZATION)
def bwd_rows_kernel(
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
    """The two peaks, less the bias of the keys, and delta, see :func:`bwd_rows_kernel`."""
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


@triton.jit(do_not_specialize=NO_SPECIALIZATION)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, starts_ptr, residuals_ptr, stats_ptr, words_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    H, G, T, TP, PP, stride_i, block_size, window_blocks, scale, factor, bias, keep_threshold, keep_scale,
    HAS_FAR: tl.constexpr, HAS_STARTS: tl.constexpr, CAUSAL: tl.constexpr,
    TWO_PEAKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
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

    origin = load_origin(starts_ptr, b, T, HAS_STARTS)
    first_window = window_start(start_m, origin, block_size, window_blocks)
    last_window = window_start(stop_m - 1, origin, block_size, window_blocks)
    first_stop = window_stop(start_m, origin, T, block_size, window_blocks, CAUSAL)
    last_stop = window_stop(stop_m - 1, origin, T, block_size, window_blocks, CAUSAL)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if HAS_FAR:
        index_ptr = residuals_ptr + offset(b, stride_i)
        counts_ptr = index_ptr + PP + T
        full, far_stop, stop, gap, full_again, total_far = far_range(
            counts_ptr, start_m, stop_m, origin, T, block_size, window_blocks, CAUSAL
        )
        far_peak, far_rest, _ = _load_stats(stats_ptr, TP, bias, TWO_PEAKS)
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
            dq = dq_step(
                dq, dout, delta, far_peak, far_rest, s, factor, k, v, columns, r0, r1,
                keep_threshold, keep_scale, TWO_PEAKS, HAS_DROPOUT, PRECISION,
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
        dq = dq_step(
            dq, dout, delta, peak, rest, s, factor, k, v, columns, r0, r1, keep_threshold, keep_scale,
            TWO_PEAKS, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    d = tl.arange(0, BLOCK_D)
    dq_ptr += offset(b, stride_dqb) + offset(h, stride_dqh)
    # Places in the tile: rows would stay in registers through both loops.
    i = tl.arange(0, BLOCK_M)
    dq_ptr += offset(start_m, stride_dqt)
    inside = (i < T - start_m)[:, None] & (d < D)[None, :]
    pointers = dq_ptr + offset(i, stride_dqt)[:, None] + d[None, :]
    store_rounded(pointers, dq * scale, inside, dq_ptr.dtype.element_ty)


@triton.jit
def _key_gradients(
    q_ptr, dout_ptr, stats_ptr, words_ptr, k, v, columns, first, end,
    start_m, stop_m, gap_at, gap, full_lo, full_hi, b, kv_head,
    stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt,
    H, G, T, TP, factor, bias, keep_threshold, keep_scale,
    HAS_END: tl.constexpr, OUTSIDE: tl.constexpr,
    TWO_PEAKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(dk / scale, dv) of a tile of keys, over the queries ``start_m <= i < stop_m`` of its G query heads.

    Key j is seen by the queries from first(j) up to end(j) (all later ones without HAS_END); tiles within
    full_lo and full_hi need no mask. OUTSIDE: it is seen by those before first(j) and from end(j) on; tiles
    outside full_lo and full_hi need no mask, and of the queries from gap_at on, ``gap`` are skipped.
    dv_j = sum_i keep p_ij dout_i / (1 - p);  dk_j = scale sum_i ds_ij q_i.
    """
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(G):
        h = kv_head * G + g
        q_head = q_ptr + offset(b, stride_qb) + offset(h, stride_qh)
        dout_head = dout_ptr + offset(b, stride_gb) + offset(h, stride_gh)
        bh = b * H + h
        for step in tl.range(start_m, stop_m, BLOCK_M, num_stages=STAGES):
            start = step
            if OUTSIDE:
                start += tl.where(step >= gap_at, gap, 0)
            rows = start + tl.arange(0, BLOCK_M)
            q = load_rows(q_head, rows, stride_qt, rows < T, D, BLOCK_D)
            dout = load_rows(dout_head, rows, stride_gt, rows < T, D, BLOCK_D)
            peak, rest, delta = _load_stats(stats_ptr + offset(bh, TP) * 3 + rows, TP, bias, TWO_PEAKS)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            if OUTSIDE:
                is_cut = (start + BLOCK_M > full_lo) & (start < full_hi)
            else:
                is_cut = (start < full_lo) | (start + BLOCK_M > full_hi)
            if is_cut:
                if OUTSIDE:
                    seen = (rows[None, :] < first[:, None]) | (rows[None, :] >= end[:, None])
                else:
                    seen = rows[None, :] >= first[:, None]
                    if HAS_END:
                        seen = seen & (rows[None, :] < end[:, None])
                s = tl.where(seen, s, float("-inf"))
            p = probabilities(s, factor, peak[None, :], rest[None, :], TWO_PEAKS)
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


@triton.jit(do_not_specialize=NO_SPECIALIZATION)
def dkv_far_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, starts_ptr, residuals_ptr, stats_ptr, words_ptr, dk_far_ptr, dv_far_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt,
    H, G, T, TP, PP, stride_i, block_size, window_blocks, scale, factor, bias, keep_threshold, keep_scale,
    HAS_STARTS: tl.constexpr, CAUSAL: tl.constexpr,
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

    origin = load_origin(starts_ptr, b, T, HAS_STARTS)
    past = first_query_past(columns, origin, block_size, window_blocks)
    start_m = tl.min(past, axis=0) // BLOCK_M * BLOCK_M
    stop_m = T
    # Nobody reads what pads are given, so they need no mask.
    full_lo = tl.max(tl.where(columns < T, past, 0), axis=0)
    full_hi = T + BLOCK_M
    first, gap_at, gap = past, 0, 0
    if not CAUSAL:
        # The queries before some key's window, then those after some key's window.
        first = window_start(columns, origin, block_size, window_blocks)
        full_hi = full_lo
        full_lo = tl.min(first, axis=0)
        gap_at = tl.cdiv(tl.max(tl.where(columns < T, first, 0), axis=0), BLOCK_M) * BLOCK_M
        resume = tl.maximum(start_m, gap_at)
        gap = resume - gap_at
        start_m, stop_m = 0, gap_at + tl.maximum(T - resume, 0)
    dk, dv = _key_gradients(
        q_ptr, dout_ptr, stats_ptr, words_ptr, k, v, columns, first, past,
        start_m, stop_m, gap_at, gap, full_lo, full_hi, b, kv_head,
        stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt,
        H, G, T, TP, factor, bias, keep_threshold, keep_scale,
        False, not CAUSAL, TWO_PEAKS, HAS_DROPOUT, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    if HAS_DROPOUT:
        dv *= keep_scale
    d = tl.arange(0, BLOCK_D)
    # Places in the tile: index and columns would stay in registers through the loop. Pads are stored as well.
    j = tl.arange(0, BLOCK_N)
    at = (offset(pid // tiles, PP) + pid % tiles * BLOCK_N) * D + offset(j, D)[:, None] + d[None, :]
    inside = tl.broadcast_to((d < D)[None, :], (BLOCK_N, BLOCK_D))
    store_rounded(dk_far_ptr + at, dk * scale, inside, dk_far_ptr.dtype.element_ty)
    store_rounded(dv_far_ptr + at, dv, inside, dv_far_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=NO_SPECIALIZATION)
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, starts_ptr, residuals_ptr, stats_ptr, words_ptr, dk_far_ptr, dv_far_ptr,
    dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    H, G, T, TP, PP, stride_i, block_size, window_blocks, scale, factor, keep_threshold, keep_scale,
    HAS_FAR: tl.constexpr, HAS_STARTS: tl.constexpr, CAUSAL: tl.constexpr,
    TWO_PEAKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
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

    origin = load_origin(starts_ptr, b, T, HAS_STARTS)
    # The queries in whose windows a key lies: of each key, of the first one and of the last one.
    first, first_of_first, first_of_last = columns, start_n, stop_n - 1
    if not CAUSAL:
        first = window_start(columns, origin, block_size, window_blocks)
        first_of_first = window_start(start_n, origin, block_size, window_blocks)
        first_of_last = window_start(stop_n - 1, origin, block_size, window_blocks)
    end = first_query_past(columns, origin, block_size, window_blocks)
    end_of_first = first_query_past(start_n, origin, block_size, window_blocks)
    start_m = first_of_first // BLOCK_M * BLOCK_M
    stop_m = tl.minimum(first_query_past(stop_n - 1, origin, block_size, window_blocks), T)
    if HAS_STARTS:
        # Nobody sees a key before its sample.
        end = tl.where(columns < origin, 0, end)
        end_of_first = tl.where(start_n < origin, 0, end_of_first)
        stop_m = tl.where(stop_n <= origin, start_m, stop_m)
    dk, dv = _key_gradients(
        q_ptr, dout_ptr, stats_ptr, words_ptr, k, v, columns, first, end,
        start_m, stop_m, 0, 0, first_of_last, end_of_first, b, kv_head,
        stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt,
        H, G, T, TP, factor, 0.0, keep_threshold, keep_scale,
        True, False, TWO_PEAKS, HAS_DROPOUT, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    dk *= scale
    if HAS_DROPOUT:
        dv *= keep_scale
    d = tl.arange(0, BLOCK_D)
    # Places in the tile: columns would stay in registers through the loop.
    j = tl.arange(0, BLOCK_N)
    inside = (j < T - start_n)[:, None] & (d < D)[None, :]
    if HAS_FAR:
        ranks_ptr = residuals_ptr + offset(b, stride_i) + PP + start_n
        rank = tl.load(ranks_ptr + j, mask=j < T - start_n, other=-1)
        far = inside & (rank >= 0)[:, None]
        at = offset(pid // tiles, PP) * D + offset(rank, D)[:, None] + d[None, :]
        dk += tl.load(dk_far_ptr + at, mask=far, other=0.0).to(tl.float32)
        dv += tl.load(dv_far_ptr + at, mask=far, other=0.0).to(tl.float32)
    dk_ptr += offset(b, stride_dkb) + offset(kv_head, stride_dkh)
    dv_ptr += offset(b, stride_dvb) + offset(kv_head, stride_dvh)
    dk_pointers = dk_ptr + offset(start_n, stride_dkt) + offset(j, stride_dkt)[:, None] + d[None, :]
    dv_pointers = dv_ptr + offset(start_n, stride_dvt) + offset(j, stride_dvt)[:, None] + d[None, :]
    store_rounded(dk_pointers, dk, inside, dk_ptr.dtype.element_ty)
    store_rounded(dv_pointers, dv, inside, dv_ptr.dtype.element_ty)
