# SPDX-License-Identifier: Apache-2.0
"""A row of a norm in a Triton program. Imported only once a Triton kernel is to run.

A row lives in the registers of one program (C <= rows.GPU_MAX_WIDTH), as a tuple of pieces of BLOCK_C
columns: a tile is a power of two, and one for a row of 2,560 would be of 4,096. Pieces are added up before a
reduction, so that there is one for each sum. Programs are persistent: as many as fit the GPU share the rows,
so weights are read once and weight gradients summed in registers.
"""

# Triton's tuples grow: x = () and x += (piece,).
# mypy: disable-error-code="assignment"

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels import _device
from cogview_kernels._dropout import Dropout
from cogview_kernels._triton import (
    _WIDEN,
    Launch,
    Plans,
    dropout_arguments,
    dropout_keeps,
    dropout_rows,
    offset,
    round_to,
    store_rounded,
)

SM_REGISTERS = 65536


@functools.cache
def tiling(C: int, element_size: int, registers: int) -> dict[str, int]:
    """Four columns of each piece a thread, at most five pieces; ``registers``: what a thread then needs."""
    warps = triton.next_power_of_2(triton.cdiv(C, 5 * 128))
    block = 128 * warps
    row = triton.cdiv(C, block) * block * element_size
    # With two stages the loads of the next row begin as this one ends, with three a row earlier. Then the
    # backward has two rows of four tensors in shared memory, of which some chips have 99 KiB.
    stages = 3 if 8 * row <= 96 * 1024 else 2
    return {"C": C, "BLOCK_C": block, "STAGES": stages, "num_warps": warps, "maxnreg": registers}


def programs(rows: int, device: torch.device, tiling: dict[str, int]) -> int:
    """How many persistent programs share the rows: as many as are resident at once."""
    # Some chips hold 16 programs a multiprocessor at most.
    resident = min(16, SM_REGISTERS // (32 * tiling["num_warps"] * tiling["maxnreg"]))
    return min(rows, resident * _device.multiprocessors(device))


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _max_and_sum(a0, a1, b0, b1):
    return tl.maximum(a0, b0), a1 + b1


@triton.jit
def sum_pair(a, b):
    """``sum(a), sum(b)`` in one reduction (two in the interpreter, which has only those it knows)."""
    if _WIDEN:
        first, second = tl.sum(a, axis=0), tl.sum(b, axis=0)
    else:
        first, second = tl.reduce((a, b), 0, _add_pairs)
    return first, second


@triton.jit
def columns_of(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The columns of each piece; past C in the last alone."""
    columns = ()
    for first in tl.static_range(0, C, BLOCK_C):
        columns += (first + tl.arange(0, BLOCK_C),)
    return columns


@triton.jit
def load_row(pointer, row, C: tl.constexpr, columns):
    """Row ``row`` of contiguous ``[R, C]`` in float32; 0 past its end."""
    pointer += offset(row, C)
    x = ()
    for i in tl.static_range(len(columns)):
        x += (tl.load(pointer + columns[i], mask=columns[i] < C, other=0.0).to(tl.float32),)
    return x


@triton.jit
def store_row(pointer, row, x, C: tl.constexpr, columns):
    """The reverse, rounded."""
    pointer += offset(row, C)
    for i in tl.static_range(len(columns)):
        store_rounded(pointer + columns[i], x[i], columns[i] < C, pointer.dtype.element_ty)


@triton.jit
def fill_row(value: tl.constexpr, columns):
    x = ()
    for i in tl.static_range(len(columns)):
        x += (tl.full(columns[i].shape, value, tl.float32),)
    return x


@triton.jit
def load_parameter(pointer, C: tl.constexpr, columns, fill: tl.constexpr, added: tl.constexpr = 0.0):
    """A weight or bias in float32, plus ``added``; ``fill`` where there is none."""
    if pointer is None:
        x = fill_row(fill, columns)
    else:
        x = load_row(pointer, 0, C, columns)
        if added != 0.0:
            x = add_rows(x, fill_row(added, columns))
    return x


@triton.jit
def save_statistics(stats_ptr, norm: tl.constexpr, row, R, mean, rstd, RMS: tl.constexpr):
    """Those of a row in the first or second norm of [norms, R] or [norms, 2, R] statistics."""
    if RMS:
        tl.store(stats_ptr + offset(R, norm) + row, rstd)
    else:
        tl.store(stats_ptr + offset(R, 2 * norm) + row, mean)
        tl.store(stats_ptr + offset(R, 2 * norm + 1) + row, rstd)


@triton.jit
def load_statistics(stats_ptr, norm: tl.constexpr, row, R, RMS: tl.constexpr):
    """``(mean, rstd)``"""
    if RMS:
        mean = 0.0
        rstd = tl.load(stats_ptr + offset(R, norm) + row)
    else:
        mean = tl.load(stats_ptr + offset(R, 2 * norm) + row)
        rstd = tl.load(stats_ptr + offset(R, 2 * norm + 1) + row)
    return mean, rstd


@triton.jit
def add_rows(a, b):
    x = ()
    for i in tl.static_range(len(a)):
        x += (a[i] + b[i],)
    return x


@triton.jit
def round_row(x, C: tl.constexpr, columns, dtype: tl.constexpr):
    """To ``dtype``, as float32 still; 0 past C."""
    y = ()
    for i in tl.static_range(len(columns)):
        y += (round_to(tl.where(columns[i] < C, x[i], 0.0), dtype),)
    return y


@triton.jit
def affine(x, weight, bias, C: tl.constexpr, columns, ROUND: tl.constexpr, dtype: tl.constexpr):
    """``x * weight + bias``; with ROUND ``x`` is rounded to ``dtype`` first."""
    if ROUND:
        x = round_row(x, C, columns, dtype)
    y = ()
    for i in tl.static_range(len(x)):
        y += (x[i] * weight[i] + bias[i],)
    return y


@triton.jit
def sum_of_pieces(x):
    total = x[0]
    for i in tl.static_range(1, len(x)):
        total += x[i]
    return total


@triton.jit
def abs_max_of_pieces(x):
    abs_max = tl.abs(x[0])
    for i in tl.static_range(1, len(x)):
        abs_max = tl.maximum(abs_max, tl.abs(x[i]))
    return abs_max


@triton.jit
def drop(x, row, columns, seed, keep_threshold, keep_scale):
    """``x * keep_scale`` where the element of this row survives, else 0."""
    row = tl.cast(row, tl.int32)
    zero = tl.zeros_like(row)
    r0, r1 = dropout_rows(seed, row, zero, zero)
    y = ()
    for i in tl.static_range(len(columns)):
        y += (tl.where(dropout_keeps(r0, r1, columns[i], keep_threshold), x[i] * keep_scale, 0.0),)
    return y


@triton.jit
def load_abs_max(abs_maxima_ptr, COUNT):
    """The maximum of what the programs of a pass before left."""
    abs_max = tl.zeros([256], tl.float32)
    for first in range(0, COUNT, 256):
        i = first + tl.arange(0, 256)
        abs_max = tl.maximum(abs_max, tl.load(abs_maxima_ptr + i, mask=i < COUNT, other=0.0))
    return tl.max(abs_max, axis=0)


@triton.jit
def _powers_of_two(abs_max):
    """``(scale, 1 / scale)``, where ``abs_max * scale`` is near 1."""
    exponent = abs_max.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _reciprocal_root(variance):
    """``1 / sqrt(variance)``, 0 of 0."""
    rstd = tl.where(variance == 0.0, 0.0, tl.rsqrt(variance))
    # A step of Newton's: the GPU's approximation is off by an ulp, which every element would be too.
    return rstd + rstd * (0.5 - variance * rstd * rstd * 0.5)


@triton.jit
def normalise(x, C: tl.constexpr, columns, tensor_abs_max, eps, PB_RELAX: tl.constexpr, RMS: tl.constexpr):
    """``(xhat, mean, rstd)`` of a row; of RMSNorm the mean is 0. xhat is not 0 past C."""
    if RMS:
        xhat, mean, rstd = _normalise_by_rms(x, C, tensor_abs_max, eps, PB_RELAX)
    else:
        xhat, mean, rstd = _normalise_by_mean(x, C, columns, tensor_abs_max, eps, PB_RELAX)
    return xhat, mean, rstd


@triton.jit
def _normalise_by_rms(x, C: tl.constexpr, tensor_abs_max, eps, PB_RELAX: tl.constexpr):
    """``rstd = 1 / sqrt(mean of squares + eps * (abs_max / 8)^2)``, of the row times a power of two."""
    if PB_RELAX == 0:
        scale, relaxed = 1.0, 1.0
    else:
        abs_max = tensor_abs_max
        if PB_RELAX == 1:
            abs_max = tl.max(abs_max_of_pieces(x), axis=0)
        scale, _ = _powers_of_two(abs_max)
        relaxed = abs_max * scale * 0.125
    scaled = ()
    squares = ()
    for i in tl.static_range(len(x)):
        value = x[i] * scale
        scaled += (value,)
        squares += (value * value,)
    rstd = _reciprocal_root(tl.sum(sum_of_pieces(squares), axis=0) / C + eps * relaxed * relaxed)
    xhat = ()
    for i in tl.static_range(len(x)):
        xhat += (scaled[i] * rstd,)
    return xhat, 0.0, tl.minimum(rstd * scale, 3.4028234e38)


@triton.jit
def _normalise_by_mean(x, C: tl.constexpr, columns, tensor_abs_max, eps, PB_RELAX: tl.constexpr):
    """``rstd = 1 / sqrt(variance + eps * (abs_max / 8)^2)``.

    Squares are of the row times a power of two that brings abs_max near 1: no overflow. The centred values'
    own mean undoes the rounding of the first one, so constant rows come out right."""
    sums = sum_of_pieces(x)
    if PB_RELAX == 1:
        largest = abs_max_of_pieces(x)
        if _WIDEN:
            abs_max, total = tl.max(largest, axis=0), tl.sum(sums, axis=0)
        else:
            abs_max, total = tl.reduce((largest, sums), 0, _max_and_sum)
    else:
        abs_max = tensor_abs_max
        total = tl.sum(sums, axis=0)
    if PB_RELAX == 0:
        mean = total / C
        scale, unscale, relaxed = 1.0, 1.0, 1.0
    else:
        scale, unscale = _powers_of_two(abs_max)
        relaxed = abs_max * scale * 0.125
        if tl.abs(total) < 1e37:
            mean = total * scale / C
        else:
            # The sum of values near the largest float overflows unless they are scaled first.
            sums = x[0] * scale
            for i in tl.static_range(1, len(x)):
                sums += x[i] * scale
            mean = tl.sum(sums, axis=0) / C
    centred = ()
    squares = ()
    for i in tl.static_range(len(x)):
        value = tl.where(columns[i] < C, x[i] * scale - mean, 0.0)
        centred += (value,)
        squares += (value * value,)
    rest, square = sum_pair(sum_of_pieces(centred), sum_of_pieces(squares))
    rest = rest / C
    rstd = _reciprocal_root(tl.maximum(square / C - rest * rest, 0.0) + eps * relaxed * relaxed)
    xhat = ()
    for i in tl.static_range(len(x)):
        xhat += ((centred[i] - rest) * rstd,)
    return xhat, (mean + rest) * unscale, tl.minimum(rstd * scale, 3.4028234e38)


@triton.jit
def gradient_through(dy, x, mean, rstd, weight, C: tl.constexpr, columns, RMS: tl.constexpr):
    """``(dx, dy * xhat)`` with ``g = dy * weight``: ``dx = rstd * (g - mean(g) - xhat * mean(g * xhat))``,
    for RMSNorm without ``mean(g)``."""
    xhat = ()
    g = ()
    hats = ()
    product = ()
    for i in tl.static_range(len(x)):
        if RMS:
            xhat += (x[i] * rstd,)
        else:
            xhat += (tl.where(columns[i] < C, (x[i] - mean) * rstd, 0.0),)
        g += (dy[i] * weight[i],)
        hats += (g[i] * xhat[i],)
        product += (dy[i] * xhat[i],)
    dx = ()
    if RMS:
        hat = tl.sum(sum_of_pieces(hats), axis=0) / C
        for i in tl.static_range(len(x)):
            dx += (rstd * (g[i] - xhat[i] * hat),)
    else:
        plain, hat = sum_pair(sum_of_pieces(g), sum_of_pieces(hats))
        plain, hat = plain / C, hat / C
        for i in tl.static_range(len(x)):
            dx += (tl.where(columns[i] < C, rstd * (g[i] - plain - xhat[i] * hat), 0.0),)
    return dx, product


@triton.jit(do_not_specialize=["seed", "keep_threshold"])
def _abs_max_kernel(
    x_ptr, abs_maxima_ptr, seed, R, keep_threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """abs_maxima[program] = max |x after dropout| over the program's rows. Bytes: R C elements read."""
    columns = columns_of(C, BLOCK_C)
    abs_max = tl.zeros([BLOCK_C], tl.float32)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
        x = load_row(x_ptr, row, C, columns)
        if HAS_DROPOUT:
            x = drop(x, row, columns, seed, keep_threshold, keep_scale)
        abs_max = tl.maximum(abs_max, abs_max_of_pieces(x))
    tl.store(abs_maxima_ptr + tl.program_id(0), tl.max(abs_max, axis=0))


@triton.jit
def _reduce_partials_kernel(
    partials_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, P, C,
    SLOTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[slot][c] = sum over p of partials[p, slot, c], in a fixed order."""
    slot = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = offset(p * SLOTS + slot, C)[:, None] + columns[None, :]
        total += tl.load(partials_ptr + at, mask=(p < P)[:, None] & (columns < C)[None, :], other=0.0)
    value = tl.sum(total, axis=0)
    if slot == 0:
        _store_sum(out0_ptr, columns, value, C)
    elif slot == 1:
        _store_sum(out1_ptr, columns, value, C)
    elif slot == 2:
        _store_sum(out2_ptr, columns, value, C)
    else:
        _store_sum(out3_ptr, columns, value, C)


@triton.jit
def _store_sum(out_ptr, columns, value, C):
    if out_ptr is not None:
        store_rounded(out_ptr + columns, value, columns < C, out_ptr.dtype.element_ty)


def abs_max_programs(R: int, C: int, x: Tensor) -> int:
    """How many maxima :func:`launch_abs_max` gives for R rows of C."""
    return programs(R, x.device, tiling(C, x.element_size(), 80))


def _plan_abs_max(R: int, C: int, x: Tensor, dropout: Dropout | None) -> Launch:
    _, keep_threshold, keep_scale = dropout_arguments(dropout)
    return Launch(
        _abs_max_kernel,
        (abs_max_programs(R, C, x),),
        (R, keep_threshold, keep_scale),
        HAS_DROPOUT=dropout is not None,
        **tiling(C, x.element_size(), 80),
    )


_abs_max_plans: Plans[Launch] = Plans(_plan_abs_max)


def launch_abs_max(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Absolute maxima that together cover ``x`` after dropout, for pb_relax="tensor"."""
    C = x.shape[-1]
    R = x.numel() // C
    key = (R, C, x.element_size(), x.device, dropout and dropout.keep_threshold)
    launch = _abs_max_plans.get(key, R, C, x, dropout)
    abs_maxima = x.new_empty(launch.grid, dtype=torch.float32)
    launch(x, abs_maxima, seed=dropout_arguments(dropout)[0])
    return abs_maxima


def _plan_reduce_partials(P: int, slots: int, C: int) -> Launch:
    block_c = 64
    grid = (triton.cdiv(C, block_c), slots)
    return Launch(_reduce_partials_kernel, grid, (P, C), SLOTS=slots, BLOCK_P=32, BLOCK_C=block_c)


_reduce_partials_plans: Plans[Launch] = Plans(_plan_reduce_partials)


def empty_partials(
    launch: Launch, C: int, device: torch.device, outs: Sequence[Tensor | None]
) -> Tensor | None:
    """[programs, slots, C], a slot for each of ``outs``; None where all of these are, for frozen weights."""
    if all(out is None for out in outs):
        return None
    return torch.empty((*launch.grid, len(outs), C), dtype=torch.float32, device=device)


def launch_reduce_partials(partials: Tensor | None, outs: Sequence[Tensor | None]) -> None:
    """A sum of the partial ones for each of ``outs`` that is not None."""
    if partials is not None:
        shape = tuple(partials.shape)
        _reduce_partials_plans.get(shape, *shape)(partials, *(*outs, None, None, None)[:4])
