# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees, for Triton: the rule of ``layout.window_start`` and what follows from it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window_start_of_block(block, block_size, window_blocks):
    """The first key in the window of the queries of a block."""
    return tl.maximum(block - window_blocks + 1, 0) * block_size


@triton.jit
def window_start(query, block_size, window_blocks):
    """The first key in the window of a query; keys before it are far."""
    return window_start_of_block(query // block_size, block_size, window_blocks)


@triton.jit
def first_query_past(key, block_size, window_blocks):
    """The first query for which a key is left of the window: those from here on see it if it is a pivot."""
    return (key // block_size + window_blocks) * block_size


@triton.jit
def in_window(key, query, start):
    """Whether the window of a query, which begins at ``start``, has a key. Arguments broadcast."""
    return (key <= query) & (key >= start)
