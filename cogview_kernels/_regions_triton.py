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
def in_window(key, start, stop):
    """Whether a window from ``start`` up to ``stop`` has a key. Arguments broadcast."""
    return (key < stop) & (key >= start)


@triton.jit
def load_origin(starts_ptr, b, length, HAS_STARTS: tl.constexpr):
    """The first position of sample ``b``, up to ``length``."""
    origin = 0
    if HAS_STARTS:
        origin = tl.minimum(tl.maximum(tl.load(starts_ptr + b), 0), length).to(tl.int32)
    return origin
