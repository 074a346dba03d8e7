# SPDX-License-Identifier: Apache-2.0
"""The index of the pivots, and how the kernels of both directions walk over a tile's far keys with it.

Letters and the order of keys: see ``triton_kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cogview_kernels._regions_triton import load_origin, window_block
from cogview_kernels._triton import offset


@triton.jit
def index_kernel(
    pivots_ptr, starts_ptr, residuals_ptr, P, PP, T, stride_i, block_size,
    HAS_STARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each sample, in a row of ``stride_i`` integers: the pivots in ascending order, T where padded up to
    PP; the rank of each position among them, -1 for those that are none (T of them); and how many pivots lie
    before each block of the layout, and before the end.

    One program a sample. It marks the pivots among the positions (where the ranks will stand), and a running
    count of the marks is all three. A pivot wrongly given twice counts once, one past T or before the sample
    not at all."""
    b = tl.program_id(0)
    origin = load_origin(starts_ptr, b, T, HAS_STARTS)
    pivots_ptr += offset(b, P)
    sorted_ptr = residuals_ptr + offset(b, stride_i)
    rank_ptr = sorted_ptr + PP
    counts_ptr = rank_ptr + T
    lanes = tl.arange(0, BLOCK)
    for start in range(0, T, BLOCK):
        tl.store(rank_ptr + start + lanes, tl.zeros([BLOCK], tl.int32), mask=start + lanes < T)
    for start in range(0, PP, BLOCK):
        tl.store(sorted_ptr + start + lanes, tl.zeros([BLOCK], tl.int32) + T, mask=start + lanes < PP)
    tl.debug_barrier()
    for start in range(0, P, BLOCK):
        pivot = tl.load(pivots_ptr + start + lanes, mask=start + lanes < P, other=-1).to(tl.int32)
        tl.store(rank_ptr + pivot, tl.full([BLOCK], 1, tl.int32), mask=(pivot >= origin) & (pivot < T))
    tl.debug_barrier()
    before = 0
    for start in range(0, T, BLOCK):
        position = start + lanes
        mark = tl.load(rank_ptr + position, mask=position < T, other=0)
        rank = before + tl.cumsum(mark, axis=0) - mark
        tl.store(rank_ptr + position, tl.where(mark == 1, rank, -1), mask=position < T)
        tl.store(sorted_ptr + rank, position, mask=mark == 1)
        # Where a block begins, the count so far is how many pivots lie before it.
        block = (position - origin) // block_size
        begins = (position >= origin) & (origin + block * block_size == position)
        tl.store(counts_ptr + block, rank, mask=begins & (position < T))
        before += tl.sum(mark, axis=0)
    # Past the last block of the sample.
    blocks = tl.cdiv(T, block_size)
    for start in range(tl.cdiv(T - origin, block_size), blocks + 1, BLOCK):
        tl.store(
            counts_ptr + start + lanes, tl.zeros([BLOCK], tl.int32) + before, mask=start + lanes <= blocks
        )


@triton.jit
def far_range(
    counts_ptr, start_m, stop_m, origin, T, block_size, window_blocks, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The far keys of the queries from ``start_m`` up to ``stop_m``, as places in the list of sorted pivots.

    They are a prefix of the list and, where the layout is not causal, a suffix, in one row: ``stop`` of them,
    which past place ``far_stop`` skip ``gap`` pivots of the list. All queries see those before ``full``, and
    those from ``full_again`` on, a place in the row. ``total`` is how many pivots there are."""
    full = tl.load(counts_ptr + window_block(start_m, origin, block_size, window_blocks))
    far_stop = tl.load(counts_ptr + window_block(stop_m - 1, origin, block_size, window_blocks))
    stop, gap, full_again, total = far_stop, 0, far_stop, far_stop
    if not CAUSAL:
        blocks = tl.cdiv(T, block_size)
        total = tl.load(counts_ptr + blocks)
        after = tl.load(counts_ptr + block_past(start_m, origin, blocks, block_size, window_blocks))
        # Where the windows of the queries lie apart, nothing is skipped, and nothing comes twice.
        after = tl.maximum(after, far_stop)
        gap = after - far_stop
        stop = total - gap
        last = block_past(stop_m - 1, origin, blocks, block_size, window_blocks)
        full_again = tl.load(counts_ptr + last) - gap
    return full, far_stop, stop, gap, full_again, total


@triton.jit
def block_past(query, origin, blocks, block_size, window_blocks):
    """The block after the window of a query; of one before its sample, that of the first query."""
    return tl.minimum(tl.maximum(query - origin, 0) // block_size + window_blocks, blocks)


@triton.jit
def sees_far(
    counts_ptr, index, rows, origin, T, total, block_size, window_blocks, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Whether queries (first dimension) see pivots by their places in the list."""
    inside = rows < T
    count = tl.load(counts_ptr + window_block(rows, origin, block_size, window_blocks), mask=inside, other=0)
    seen = index[None, :] < count[:, None]
    if not CAUSAL:
        past = block_past(rows, origin, tl.cdiv(T, block_size), block_size, window_blocks)
        count = tl.load(counts_ptr + past, mask=inside, other=0)
        seen = seen | ((index[None, :] >= count[:, None]) & (index[None, :] < total))
    return seen
