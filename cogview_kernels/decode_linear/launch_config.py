# SPDX-License-Identifier: Apache-2.0
"""Tiles of the Triton kernels of decode_linear. Chosen by what they compile to; no GPU has timed them yet."""

from __future__ import annotations

from dataclasses import dataclass

# Rows of x from which 16-bit products go to the matrix units. A row costs a multiplication and an addition a
# weight, and four or fewer fit between the loads of an H100.
MATRIX_UNITS_FROM = 5

# By the bytes of an element, the most rows that one read of the weights serves without matrix units. More
# would take more registers for sums than they leave for weights under way.
_ROWS_AT_ONCE = {2: 4, 4: 8}

# 16-byte loads of weights that a thread has under way at once.
_LOADS = 10


@dataclass(frozen=True)
class Vectors:
    """A program has ``rows`` of x, and each of its warps ``outputs`` outputs, whose weights come in turns of
    ``pieces`` of ``block_k``: 16 bytes a thread each."""

    rows: int
    outputs: int
    block_k: int
    pieces: int
    num_warps: int = 4


def vectors(rows: int, K: int, element_size: int) -> Vectors:
    groups = -(-rows // _ROWS_AT_ONCE[element_size])
    rows = -(-rows // groups)
    # A second output halves how often x is loaded and widened, which with three rows is most of the work.
    outputs = 1 if rows <= 2 else 2
    block_k = 32 * 16 // element_size
    pieces = -(-K // block_k)
    # As few turns as possible, then as short ones: 2,560 bfloat16 are one turn of ten pieces.
    turns = -(-pieces * outputs // _LOADS)
    return Vectors(rows, outputs, block_k, -(-pieces // turns))


@dataclass(frozen=True)
class Tiles:
    """A program has all rows of x, padded to ``block_n``, and ``block_o`` outputs; each warp multiplies its
    own ``block_k`` of K, and ``stages`` tiles are in shared memory."""

    block_n: int
    block_o: int
    block_k: int
    num_warps: int
    stages: int


def tiles(rows: int, O: int, multiprocessors: int) -> Tiles:
    block_n, block_o = 8 if rows <= 8 else 16, 32
    # So many that all programs of a multiprocessor fit in its shared memory.
    programs = -(-O // (block_o * multiprocessors))
    stages = {1: 5, 2: 4}.get(programs, 3)
    return Tiles(block_n, block_o, 64, 4, stages)
