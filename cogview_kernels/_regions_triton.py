# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees, for Triton: the rule of ``layout.window_start`` and what follows from it.

``origin`` is the first position of a sample, from which its blocks are counted.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window_block(query, origin, block_size, window_blocks):
    """The block with which the window of a query begins."""
    return tl.maximum((query - origin) // block_size - window_blocks + 1, 0)


@triton.jit
def window_start(query, origin, block_size, window_blocks):
    """The first key in the window of a query; keys before it are far."""
    return origin + window_block(query, origin, block_size, window_blocks) * block_size


@triton.jit
def window_stop(query, origin, keys, block_size, window_blocks, CAUSAL: tl.constexpr):
    """The key after the last one in the window of a query, among ``keys``."""
    stop = query + 1
    if not CAUSAL:
        stop = tl.minimum(first_query_past(query, origin, block_size, window_blocks), keys)
    return stop


@triton.jit
def first_query_past(key, origin, block_size, window_blocks):
    """The first query for which a key is left of the window: those from here on see it if it is a pivot."""
    return origin + ((key - origin) // block_size + window_blocks) * block_size


@triton.jit
def tile_before(end, start, BLOCK: tl.constexpr):
    """Of each row whether the BLOCK positions from ``start`` on lie before ``end``: ``[rows, BLOCK]``.

    In the layout of scores a thread has a pair of every eight positions. Where an eight begins is a
    constant of the compiled kernel. Were it the sum ``start + column``, all columns would stay in registers
    through the loops, most of whose tiles have no mask."""
    pair = tl.arange(0, 8)[None, None, :]
    eights = 8 * tl.arange(0, BLOCK // 8)[None, :, None]
    return tl.reshape(eights < (end - start)[:, None, None] - pair, [end.shape[0], BLOCK])


@triton.jit
def load_origin(starts_ptr, b, length, HAS_STARTS: tl.constexpr):
    """The first position of sample ``b``, up to ``length``."""
    origin = 0
    if HAS_STARTS:
        origin = tl.minimum(tl.maximum(tl.load(starts_ptr + b), 0), length).to(tl.int32)
    return origin
