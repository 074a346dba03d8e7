# SPDX-License-Identifier: Apache-2.0
"""Decode attention on NVIDIA GPUs from compute capability 8.0: bound by memory.

Letters: B samples, H query heads, Hkv key heads, G = H / Hkv, Tq new positions, R = G Tq rows that share the
keys of a head, S positions of the cache, D head size (BLOCK_D the power of two it is padded to), P pivots a
sample; tiles have BLOCK_M rows and BLOCK_N keys.

The keys of a sample are items in a row: its pivots as they are listed, then all positions from the first
query's window on (without a layout: all positions). How many there are only the device knows. The splits of a
head share them equally, in steps of _STEP, so that a short sequence in a large cache keeps the chip as busy
as a long one. Each split writes its maximum, sum and output in float32, and whichever split of a row tile
finishes last, as a counter tells it, merges them all in the order of the splits: two runs give the same bits.
A head that is not split writes its output itself.

Scores are compared unscaled, and differences are scaled: see ``Terms``.

Bytes: k and v of the keys seen, once per BLOCK_M rows; where heads are split, 4 (D + 2) more written and read
a row and split. FLOPs: 4 D a row and key; several rows are padded to 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels import _counters
from cogview_kernels._attention_triton import LOWEST, SMALLEST_NORMAL
from cogview_kernels._regions_triton import load_origin, window_start
from cogview_kernels._triton import LOG2E, Launch, Plans, load_rows, offset, precision, store_rounded
from cogview_kernels.decode_attention import native
from cogview_kernels.layout import ThreeRegionLayout

# Items of a split are a multiple of it.
_STEP = tl.constexpr(16)

# Programs that a chip of 132 multiprocessors gets at most by splitting heads: two on each, at once. They have
# 32 KB on their way, more than the memory's latency asks for, and more programs make a longer merge. A sweep
# on an H100 found 240 programs the fastest for 40 heads, see benchmarks/NOTES.md.
_PROGRAMS = 2 * 132
_MOST_SPLITS = 128


@triton.jit
def _merge_splits(
    partial_ptr, cells, row, inside, splits, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``(o, l)`` of rows: sums over their splits i of 2^(f (m_i - m)) o_i and of 2^(f (m_i - m)) l_i."""
    # As many splits at once as registers hold: each turn waits for memory once.
    TILE: tl.constexpr = BLOCK_M * BLOCK_D
    BLOCK_SPLITS: tl.constexpr = 2048 // TILE if TILE < 2048 else 1
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Asynchronous copies of a pipelined loop might go through the L1 cache, which is no place for what other
    # multiprocessors wrote: loads are plain and from the L2 cache.
    for start in tl.range(0, splits, BLOCK_SPLITS, num_stages=1):
        index = start + tl.arange(0, BLOCK_SPLITS)
        there = inside[:, None] & (index < splits)[None, :]
        cell = offset(row, splits)[:, None] + index[None, :]
        there_d = there[:, :, None]
        if D < BLOCK_D:
            there_d = there_d & (d < D)[None, None, :]
        pointers = partial_ptr + offset(cell, D)[:, :, None] + d[None, None, :]
        part = tl.load(pointers, mask=there_d, other=0.0, cache_modifier=".cg")
        maxima_ptr = partial_ptr + offset(cells, D) + cell
        maxima = tl.load(maxima_ptr, mask=there, other=LOWEST, cache_modifier=".cg")
        totals = tl.load(maxima_ptr + cells, mask=there, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, tl.max(maxima, axis=1))
        weight = tl.exp2((maxima - new_max[:, None]) * factor)
        old_weight = tl.exp2((row_max - new_max) * factor)
        total = total * old_weight + tl.sum(totals * weight, axis=1)
        acc = acc * old_weight[:, None] + tl.sum(part * weight[:, :, None], axis=1)
        row_max = new_max
    return acc, total


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, starts_ptr, pivots_ptr, partial_ptr, counters_ptr, out_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    Hkv, G, Tq, S, P, block_size, window_blocks, row_tiles, splits, cells, sign, factor, bias,
    HAS_REGIONS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = o / l. Of a split's keys, with x_j = sign q k_j + bias_j and f the factor: m = max x_j,
    p_j = 2^(f (x_j - m)), l = sum p_j, o = sum p_j v_j.

    Partials: o ``[B, Hkv, R, splits, D]``, then m and l ``[B, Hkv, R, splits]``, cells = B Hkv R splits each;
    a split without items writes l = 0 and o = 0. Counters: ``[B, Hkv, row_tiles]``, zero before and after."""
    pid = tl.program_id(0)
    # The row tiles of a split are neighbours: all but the first find its keys in the L2 cache.
    row_tile = pid % row_tiles
    start_m = row_tile * BLOCK_M
    split = pid // row_tiles % splits
    bh = pid // row_tiles // splits
    b = bh // Hkv
    kv_head = bh % Hkv
    out_rows = start_m + tl.arange(0, BLOCK_M)

    # Nothing before or past the sequence is ever read: it may be anything. A wrong length must not leave the
    # cache.
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), S).to(tl.int32)
    origin = load_origin(starts_ptr, b, length, HAS_STARTS)
    listed, window, latest_start = 0, origin, 0
    if HAS_REGIONS:
        window = window_start(tl.maximum(length - Tq, 0), origin, block_size, window_blocks)
        latest_start = window_start(tl.maximum(length - 1, 0), origin, block_size, window_blocks)
        # As long as the last query's window reaches the start, no key is far.
        listed = tl.where(latest_start > origin, P, 0)
    items = listed + length - window
    share = tl.cdiv(tl.cdiv(items, splits), _STEP) * _STEP
    start = split * share
    stop = tl.minimum(start + share, items)

    # A row alone would fill a sixteenth of a matrix product. Each of BLOCK_N places then has a softmax of its
    # own, over its keys of all tiles, so that nothing in the loop waits for other warps. Loaded once a place,
    # in the layout of k: a single row of q would force its own on the loop.
    PLACES: tl.constexpr = BLOCK_N if BLOCK_M == 1 else BLOCK_M
    rows = tl.zeros([PLACES], tl.int32) if BLOCK_M == 1 else out_rows
    q_rows = offset(kv_head * G + rows // Tq, stride_qh) + offset(rows % Tq, stride_qt)
    q = load_rows(q_ptr + offset(b, stride_qb), q_rows, 1, rows < G * Tq, D, BLOCK_D)
    q = q * tl.cast(sign, q.dtype)
    k_ptr += offset(b, stride_kb) + offset(kv_head, stride_kh)
    v_ptr += offset(b, stride_vb) + offset(kv_head, stride_vh)
    pivots_ptr += offset(b, P)
    position = length - Tq + rows % Tq
    window_starts = window_start(tl.maximum(position, 0), origin, block_size, window_blocks)

    if BLOCK_M == 1:
        q = q.to(tl.float32)
    acc = tl.zeros([PLACES, BLOCK_D], tl.float32)
    row_max = tl.full([PLACES], LOWEST, tl.float32)
    total = tl.zeros([PLACES], tl.float32)
    for begin in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        item = begin + tl.arange(0, BLOCK_N)
        seen = item < stop
        at = item
        far = item < listed
        if HAS_REGIONS:
            pivot = tl.load(pivots_ptr + item, mask=seen & far, other=-1).to(tl.int32)
            at = tl.where(far, pivot, window + item - listed)
            # A pivot in the window of every query stands among its positions, too.
            seen = seen & (at >= origin) & ((at < latest_start) | ~far)
        elif HAS_STARTS:
            at = origin + item
        k = load_rows(k_ptr, at, stride_kt, seen, D, BLOCK_D)
        v = load_rows(v_ptr, at, stride_vt, seen, D, BLOCK_D)
        if BLOCK_M == 1:
            x = tl.sum(k.to(tl.float32) * q, axis=1)
            if HAS_REGIONS:
                x += tl.where(far, bias, 0.0)
            x = tl.where(seen, x, float("-inf"))
            new_max = tl.maximum(row_max, x)
            p = tl.exp2((x - new_max) * factor)
            shrink = tl.exp2((row_max - new_max) * factor)
            total = total * shrink + p
            acc = acc * shrink[:, None] + p[:, None] * v.to(tl.float32)
        else:
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            visible = seen[None, :] & (at[None, :] <= position[:, None])
            if HAS_REGIONS:
                x += tl.where(far, bias, 0.0)[None, :]
                visible = visible & (far[None, :] == (at[None, :] < window_starts[:, None]))
            x = tl.where(visible, x, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(x, axis=1))
            p = tl.exp2((x - new_max[:, None]) * factor)
            shrink = tl.exp2((row_max - new_max) * factor)
            total = total * shrink + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        row_max = new_max

    if BLOCK_M == 1:
        top = tl.max(row_max, axis=0, keep_dims=True)
        weight = tl.exp2((row_max - top) * factor)
        total = tl.sum(total * weight, axis=0, keep_dims=True)
        acc = tl.sum(acc * weight[:, None], axis=0, keep_dims=True)
        row_max = top
    # Computed only here, so that the loop holds no registers for it.
    inside = out_rows < G * Tq
    row = offset(bh, G * Tq) + out_rows
    d = tl.arange(0, BLOCK_D)
    inside_d = inside[:, None] & (d < D)[None, :]
    if HAS_SPLITS:
        cell = offset(row, splits) + split
        tl.store(partial_ptr + offset(cell, D)[:, None] + d[None, :], acc, mask=inside_d)
        maxima_ptr = partial_ptr + offset(cells, D) + cell
        tl.store(maxima_ptr, row_max, mask=inside)
        tl.store(maxima_ptr + cells, total, mask=inside)
        # One thread counts for all: their stores precede its atomic by the barrier, and by its release those
        # of the other programs precede what the last one loads. Splits without items count, too: the counter
        # returns to zero whatever the lengths are, even if someone changes them under a running kernel.
        tl.debug_barrier()
        counter_ptr = counters_ptr + bh * row_tiles + row_tile
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived != splits - 1:
            return
        tl.store(counter_ptr, 0)
        acc, total = _merge_splits(partial_ptr, cells, row, inside, splits, factor, D, BLOCK_D, BLOCK_M)
    # A query that saw no key gives zeros.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    pointers = out_ptr + offset(row, D)[:, None] + d[None, :]
    store_rounded(pointers, acc, inside_d, out_ptr.dtype.element_ty)


@dataclass(frozen=True)
class Terms:
    """A score is ``factor (sign q k + bias)``, in units of log2, with factor > 0.

    The largest score is subtracted from the others before any is scaled. Where a product is subtracted, a
    compiler may round product and difference once, as a fused multiply-add, and the largest score no longer
    cancels to 0: half an ulp of it is left, 64 at 1e9, and 2^64 is no float16."""

    sign: float
    factor: float
    bias: float

    @classmethod
    def of(cls, scale: float, pivot_bias: float) -> Terms:
        factor = abs(scale) * LOG2E.value
        # A float32 holds neither: all scores but the bias are then 0.
        if factor < SMALLEST_NORMAL or abs(pivot_bias / scale) > -LOWEST.value:
            return cls(0.0, 1.0, pivot_bias * LOG2E.value)
        return cls(1.0 if scale > 0 else -1.0, factor, pivot_bias / abs(scale))


@dataclass(frozen=True)
class Tiles:
    block_d: int
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    maxnreg: int | None = None


def tiles(rows: int, D: int, bits: int, has_regions: bool) -> Tiles:
    """For ``rows`` that share keys. Chosen among what compiles without spills; not timed on a GPU yet."""
    block_d = max(16, triton.next_power_of_2(D))
    if rows == 1:
        # Two tiles of k and v are on their way, 16 KB; registers leave room for 5 such programs or more on a
        # multiprocessor, 7 or more without regions.
        return Tiles(block_d, 1, min(128, max(8, 32768 // (bits * block_d))), 4, 3)
    block_m = min(max(16, triton.next_power_of_2(rows)), 32 if block_d <= 64 else 16)
    # Products of float32 are made without matrix units and take more registers.
    block_n = 16 if bits == 32 and block_d > 64 else 32
    num_warps = 8 if bits == 32 and block_m * block_d >= 1024 else 4
    # In this loop, positions of pivots take every second stage from the rows that they name. Without 255 some
    # registers would be spilled to make room for one more program on a multiprocessor.
    return Tiles(block_d, block_m, block_n, num_warps, 5 if has_regions else 3, maxnreg=255)


def split_count(programs: int, keys: int, t: Tiles) -> int:
    """For at most ``keys`` and ``programs`` unsplit ones; from shapes alone, as a CUDA graph needs."""
    if programs >= _PROGRAMS:
        return 1
    # From one program a multiprocessor on, twice as many should share the work more evenly; not timed.
    at_most = (1 if programs <= _PROGRAMS // 2 else 2) * _PROGRAMS // programs
    # A split shorter than the two tiles that a program has on their way at once gains nothing.
    return min(triton.cdiv(keys, 2 * t.block_n), at_most, _MOST_SPLITS)


def limit(backend: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str:
    """Why the kernels cannot take these, and the way out; empty when they can."""
    return native.limit(backend, q, k_cache, v_cache)


class _Plan(NamedTuple):
    """``partials`` float32 and ``counters`` of the splits; both 0 where heads are not split."""

    launch: Launch
    has_regions: bool
    partials: int
    counters: int


def _plan(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: ThreeRegionLayout | None,
    has_starts: bool,
    scale: float,
) -> _Plan:
    B, H, Tq, D = q.shape
    Hkv, S = k_cache.shape[1:3]
    rows = H // Hkv * Tq
    P, keys, pivot_bias = 0, S, 0.0
    block_size, window_blocks = S, 1
    if layout is not None:
        block_size = min(layout.block_size, S)
        window_blocks = min(layout.window_blocks, triton.cdiv(S, block_size))
    # A window over the whole cache leaves no key far.
    has_regions = layout is not None and block_size * window_blocks < S
    if layout is not None and has_regions:
        P, pivot_bias = layout.pivots.shape[1], layout.pivot_bias
        keys = P + min(S, block_size * window_blocks + Tq)
    t = tiles(rows, D, q.element_size() * 8, has_regions)
    row_tiles = triton.cdiv(rows, t.block_m)
    programs = B * Hkv * row_tiles
    splits = split_count(programs, keys, t)
    cells = B * H * Tq * splits
    terms = Terms.of(scale, pivot_bias)
    numbers = (
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        Hkv, H // Hkv, Tq, S, P, block_size, window_blocks, row_tiles, splits, cells,
        terms.sign, terms.factor, terms.bias,
    )  # fmt: skip
    launch = Launch(
        _decode_kernel, (programs * splits,), numbers,
        HAS_REGIONS=has_regions, HAS_STARTS=has_starts, HAS_SPLITS=splits > 1,
        PRECISION=precision(q),
        D=D, BLOCK_D=t.block_d, BLOCK_M=t.block_m, BLOCK_N=t.block_n, STAGES=t.stages, num_warps=t.num_warps,
        maxnreg=t.maxnreg,
    )  # fmt: skip
    if splits == 1:
        return _Plan(launch, has_regions, 0, 0)
    return _Plan(launch, has_regions, cells * (D + 2), programs)


_plans: Plans[_Plan] = Plans(_plan)


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    layout: ThreeRegionLayout | None,
    starts: Tensor | None,
    scale: float,
    out: Tensor,
    _: str,
) -> None:
    """Fills ``out``, by one launch. Rows of q and the caches are contiguous; ``lengths``, ``starts``, pivots
    and ``out`` are throughout."""
    regions = None
    if layout is not None:
        regions = layout.pivots.shape[1], layout.block_size, layout.window_blocks, layout.pivot_bias
    key = (
        q.shape, k_cache.shape, q.stride(), k_cache.stride(), v_cache.stride(), q.dtype, q.get_device(),
        regions, starts is not None, scale, precision(q),
    )  # fmt: skip
    plan = _plans.get(key, q, k_cache, v_cache, layout, starts is not None, scale)
    pivots = layout.pivots if layout is not None and plan.has_regions else lengths
    origins = lengths if starts is None else starts
    # Without splits neither is read.
    partial, counters = out, lengths
    if plan.counters:
        partial = out.new_empty(plan.partials, dtype=torch.float32)
        counters = _counters.zeroed(plan.counters, out.device)
    plan.launch(q, k_cache, v_cache, lengths, origins, pivots, partial, counters, out)
