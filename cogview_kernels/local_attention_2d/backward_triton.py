# SPDX-License-Identifier: Apache-2.0
"""The kernels of the backward of local attention in two dimensions.

Letters, the order of keys, bytes and FLOPs: see ``triton_kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cogview_kernels._attention_triton import NO_SPECIALIZATION, dq_step, probabilities
from cogview_kernels._triton import dropout_keeps, dropout_rows, load_rows, offset, store_rounded
from cogview_kernels.local_attention_2d.forward_triton import extra_seen, keys_seen, sees


@triton.jit(do_not_specialize=NO_SPECIALIZATION)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, extra_k_ptr, extra_v_ptr, extra_mask_ptr, out_ptr, dout_ptr, dlse_ptr, peaks_ptr,
    delta_ptr, dq_ptr, seed,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ekb, stride_ekh, stride_eke, stride_evb, stride_evh, stride_eve,
    stride_gb, stride_gh, stride_gt, stride_ob, stride_oh, stride_ot, stride_dqb, stride_dqh, stride_dqt,
    H, G, E, height, width, row_radius, column_radius, query_scale, scale, factor, keep_threshold,
    keep_scale,
    HAS_DLSE: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDE_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq = scale sum_j ds_j k_j;  ds = 2^(s - lse) (dp - delta),  dp_j = keep_j dout.v_j / (1 - p).

    ``delta`` ``[B, H, T]`` gets sum_d out dout - dlse, for the kernels of the keys."""
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
    dout_ptr += offset(b, stride_gb) + offset(h, stride_gh)
    out_ptr += offset(b, stride_ob) + offset(h, stride_oh)
    k_ptr += offset(b, stride_kb) + offset(h // G, stride_kh)
    v_ptr += offset(b, stride_vb) + offset(h // G, stride_vh)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    y, x = y0 + m // WIDE_M, x0 + m % WIDE_M
    inside = (y < query_height) & (x < query_width)
    rows = y * query_width + x
    cell_y, cell_x = y // query_scale, x // query_scale
    q = load_rows(q_ptr, rows, stride_qt, inside, D, BLOCK_D)
    dout = load_rows(dout_ptr, rows, stride_gt, inside, D, BLOCK_D)
    out = load_rows(out_ptr, rows, stride_ot, inside, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + offset(bh, T) + rows, mask=inside, other=0.0)
    tl.store(delta_ptr + offset(bh, T) + rows, delta, mask=inside)
    peaks_ptr += offset(bh, T) * 2 + rows
    peak = tl.load(peaks_ptr, mask=inside, other=float("inf"))
    rest = tl.load(peaks_ptr + T, mask=inside, other=0.0)
    r0, r1 = rows, rows
    if HAS_DROPOUT:
        r0, r1 = dropout_rows(seed, rows, h, b)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

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
        dq = dq_step(
            dq, dout, delta, peak, rest, s, factor, k, v, columns, r0, r1, keep_threshold, keep_scale,
            True, HAS_DROPOUT, PRECISION,
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
            dq = dq_step(
                dq, dout, delta, peak, rest, s, factor, k, v, height * width + e, r0, r1, keep_threshold,
                keep_scale, True, HAS_DROPOUT, PRECISION,
            )  # fmt: skip

    d = tl.arange(0, BLOCK_D)
    dq_ptr += offset(b, stride_dqb) + offset(h, stride_dqh)
    pointers = dq_ptr + offset(rows, stride_dqt)[:, None] + d[None, :]
    store_rounded(pointers, dq * scale, inside[:, None] & (d < D)[None, :], dq_ptr.dtype.element_ty)


@triton.jit
def _key_step(
    dk, dv, k, v, columns, q, dout, rows, inside, seen, peaks_ptr, delta_ptr, seed, b, h, bh, T,
    factor, keep_threshold, keep_scale, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds ds q and p dout for a tile of queries. Of those that do not exist the peak is inf, hence p = 0."""
    peak = tl.load(peaks_ptr + offset(bh, T) * 2 + rows, mask=inside, other=float("inf"))
    rest = tl.load(peaks_ptr + offset(bh, T) * 2 + T + rows, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + offset(bh, T) + rows, mask=inside, other=0.0)
    s = tl.where(seen, tl.dot(k, tl.trans(q), input_precision=PRECISION), float("-inf"))
    p = probabilities(s, factor, peak[None, :], rest[None, :], True)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    kept = p
    if HAS_DROPOUT:
        r0, r1 = dropout_rows(seed, rows, h, b)
        keeps = dropout_keeps(r0[None, :], r1[None, :], columns[:, None], keep_threshold)
        kept = tl.where(keeps, p, 0.0)
        dp = tl.where(keeps, dp * keep_scale, 0.0)
    dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=NO_SPECIALIZATION)
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, peaks_ptr, delta_ptr, dk_ptr, dv_ptr, seed,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    H, G, height, width, row_radius, column_radius, query_scale, scale, factor, keep_threshold, keep_scale,
    CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDE_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk = scale sum_i ds_i q_i, dv = sum_i keep_i p_i dout_i / (1 - p) of a patch of keys, over the queries
    whose windows have one of them, which are a patch too."""
    query_height, query_width = height * query_scale, width * query_scale
    T = query_height * query_width
    across = tl.cdiv(width, WIDE_N)
    tiles = tl.cdiv(height, BLOCK_N // WIDE_N) * across
    pid = tl.program_id(0)
    row0 = pid % tiles // across * (BLOCK_N // WIDE_N)
    column0 = pid % tiles % across * WIDE_N
    heads = H // G
    b = pid // tiles // heads
    kv_head = pid // tiles % heads
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    row, column = row0 + n // WIDE_N, column0 + n % WIDE_N
    there = (row < height) & (column < width)
    columns = row * width + column
    k_ptr += offset(b, stride_kb) + offset(kv_head, stride_kh)
    v_ptr += offset(b, stride_vb) + offset(kv_head, stride_vh)
    k = load_rows(k_ptr, columns, stride_kt, there, D, BLOCK_D)
    v = load_rows(v_ptr, columns, stride_vt, there, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    before = 0 if CAUSAL else row_radius
    first_y = tl.maximum(row0 - before, 0) * query_scale
    stop_y = tl.minimum(row0 + BLOCK_N // WIDE_N + row_radius, height) * query_scale
    first_x = tl.maximum(column0 - column_radius, 0) * query_scale
    stop_x = tl.minimum(column0 + WIDE_N + column_radius, width) * query_scale
    tiles_x = tl.cdiv(stop_x - first_x, WIDE_M)
    tiles_y = tl.cdiv(stop_y - first_y, BLOCK_M // WIDE_M)
    for g in range(G):
        h = kv_head * G + g
        q_head = q_ptr + offset(b, stride_qb) + offset(h, stride_qh)
        dout_head = dout_ptr + offset(b, stride_gb) + offset(h, stride_gh)
        for t in tl.range(0, tiles_x * tiles_y, num_stages=STAGES):
            y = first_y + t // tiles_x * (BLOCK_M // WIDE_M) + m // WIDE_M
            x = first_x + t % tiles_x * WIDE_M + m % WIDE_M
            inside = (y < stop_y) & (x < stop_x)
            rows = y * query_width + x
            q = load_rows(q_head, rows, stride_qt, inside, D, BLOCK_D)
            dout = load_rows(dout_head, rows, stride_gt, inside, D, BLOCK_D)
            seen = sees(
                row[:, None] - (y // query_scale)[None, :], column[:, None] - (x // query_scale)[None, :],
                row_radius, column_radius, CAUSAL,
            )  # fmt: skip
            dk, dv = _key_step(
                dk, dv, k, v, columns, q, dout, rows, inside, seen, peaks_ptr, delta_ptr, seed,
                b, h, b * H + h, T, factor, keep_threshold, keep_scale, HAS_DROPOUT, PRECISION,
            )  # fmt: skip

    if HAS_DROPOUT:
        dv *= keep_scale
    d = tl.arange(0, BLOCK_D)
    stored = there[:, None] & (d < D)[None, :]
    dk_ptr += offset(b, stride_dkb) + offset(kv_head, stride_dkh)
    dv_ptr += offset(b, stride_dvb) + offset(kv_head, stride_dvh)
    dk_pointers = dk_ptr + offset(columns, stride_dkt)[:, None] + d[None, :]
    dv_pointers = dv_ptr + offset(columns, stride_dvt)[:, None] + d[None, :]
    store_rounded(dk_pointers, dk * scale, stored, dk_ptr.dtype.element_ty)
    store_rounded(dv_pointers, dv, stored, dv_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=NO_SPECIALIZATION)
def dkv_extra_kernel(
    q_ptr, extra_k_ptr, extra_v_ptr, extra_mask_ptr, dout_ptr, peaks_ptr, delta_ptr, dk_ptr, dv_ptr, seed,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    H, G, E, keys, T, scale, factor, keep_threshold, keep_scale,
    HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of extra keys, over all queries; ``keys`` is how many the grid has."""
    tiles = tl.cdiv(E, BLOCK_N)
    pid = tl.program_id(0)
    heads = H // G
    b = pid // tiles // heads
    kv_head = pid // tiles % heads
    e = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    extra_k_ptr += offset(b, stride_kb) + offset(kv_head, stride_kh)
    extra_v_ptr += offset(b, stride_vb) + offset(kv_head, stride_vh)
    k = load_rows(extra_k_ptr, e, stride_kt, e < E, D, BLOCK_D)
    v = load_rows(extra_v_ptr, e, stride_vt, e < E, D, BLOCK_D)
    if HAS_MASK:
        extra_mask_ptr += offset(b, E)
    seen = extra_seen(extra_mask_ptr, e, E, HAS_MASK)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(G):
        h = kv_head * G + g
        q_head = q_ptr + offset(b, stride_qb) + offset(h, stride_qh)
        dout_head = dout_ptr + offset(b, stride_gb) + offset(h, stride_gh)
        for start in tl.range(0, T, BLOCK_M, num_stages=STAGES):
            rows = start + tl.arange(0, BLOCK_M)
            q = load_rows(q_head, rows, stride_qt, rows < T, D, BLOCK_D)
            dout = load_rows(dout_head, rows, stride_gt, rows < T, D, BLOCK_D)
            dk, dv = _key_step(
                dk, dv, k, v, keys + e, q, dout, rows, rows < T, seen[:, None], peaks_ptr, delta_ptr, seed,
                b, h, b * H + h, T, factor, keep_threshold, keep_scale, HAS_DROPOUT, PRECISION,
            )  # fmt: skip

    if HAS_DROPOUT:
        dv *= keep_scale
    d = tl.arange(0, BLOCK_D)
    stored = (e < E)[:, None] & (d < D)[None, :]
    dk_ptr += offset(b, stride_dkb) + offset(kv_head, stride_dkh)
    dv_ptr += offset(b, stride_dvb) + offset(kv_head, stride_dvh)
    dk_pointers = dk_ptr + offset(e, stride_dkt)[:, None] + d[None, :]
    dv_pointers = dv_ptr + offset(e, stride_dvt)[:, None] + d[None, :]
    store_rounded(dk_pointers, dk * scale, stored, dk_ptr.dtype.element_ty)
    store_rounded(dv_pointers, dv, stored, dv_ptr.dtype.element_ty)
