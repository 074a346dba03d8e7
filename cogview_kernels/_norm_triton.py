# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of layer_norm and sandwich_layer_norm share. Imported only once one is to run.

A row lives in the registers of one program (C <= _norm.GPU_MAX_WIDTH). Programs are persistent: as many as
fit the GPU share the rows, so weights are read once and weight gradients summed in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels._triton import _WIDEN, dropout_keeps, dropout_rows, offset, store_rounded

PROGRAMS_PER_SM = {"forward": 4, "backward": 1}
# In the interpreter: fewer than rows, so that programs take several.
INTERPRETED_PROGRAMS = 3
PEAK_PROGRAMS = 1024

_processors: dict[torch.device, int] = {}


def programs(rows: int, device: torch.device, way: str) -> int:
    """How many persistent programs share the rows."""
    if device.type != "cuda":
        return min(rows, INTERPRETED_PROGRAMS)
    if device not in _processors:
        _processors[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return min(rows, PROGRAMS_PER_SM[way] * _processors[device])


def tiling(C: int, way: str) -> dict[str, int]:
    """A row per tile. Backward holds twice as much a row, in twice as many threads."""
    block = triton.next_power_of_2(C)
    per_warp = 512 if way == "forward" else 256
    return {"BLOCK_C": block, "num_warps": max(1, min(block // per_warp, 32 if way == "backward" else 16))}


def seed_argument(seed: Tensor | None) -> int | Tensor:
    """A number where the seed lies on the CPU, else the tensor: reading that would synchronise."""
    if seed is None:
        return 0
    return int(seed.item()) if seed.device.type == "cpu" else seed


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _peak_and_sum(a0, a1, b0, b1):
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
def load_row(pointer, row, C, columns):
    """Row ``row`` of contiguous ``[R, C]`` in float32; 0 past its end."""
    return tl.load(pointer + offset(row, C) + columns, mask=columns < C, other=0.0).to(tl.float32)


@triton.jit
def load_parameter(pointer, columns, C, fill: tl.constexpr, BLOCK_C: tl.constexpr):
    """A weight or bias in float32, ``fill`` where there is none."""
    if pointer is None:
        value = tl.full([BLOCK_C], fill, tl.float32)
    else:
        value = tl.load(pointer + columns, mask=columns < C, other=0.0).to(tl.float32)
    return value


@triton.jit
def drop(x, row, columns, seed, threshold, scale):
    """``x * scale`` where the element of this row survives, else 0."""
    row = tl.cast(row, tl.int32)
    zero = tl.zeros_like(row)
    r0, r1 = dropout_rows(seed, row, zero, zero)
    return tl.where(dropout_keeps(r0, r1, columns, threshold), x * scale, 0.0)


@triton.jit
def load_peak(peaks_ptr, PEAKS: tl.constexpr, BLOCK_PEAKS: tl.constexpr):
    """The maximum of what the programs of a pass before left."""
    i = tl.arange(0, BLOCK_PEAKS)
    return tl.max(tl.load(peaks_ptr + i, mask=i < PEAKS, other=0.0), axis=0)


@triton.jit
def normalise(x, columns, C, tensor_peak, eps, PB_RELAX: tl.constexpr):
    """``(xhat, mean, rstd)`` of a row, with ``rstd = 1 / sqrt(variance + eps * (peak / 8)^2)``.

    Squares are of the row times a power of two that brings the peak near 1: no overflow. The centred values'
    own mean undoes the rounding of the first one, so constant rows come out right. xhat is not 0 past C."""
    if PB_RELAX == 1:
        if _WIDEN:
            peak, total = tl.max(tl.abs(x), axis=0), tl.sum(x, axis=0)
        else:
            peak, total = tl.reduce((tl.abs(x), x), 0, _peak_and_sum)
    else:
        peak = tensor_peak
        total = tl.sum(x, axis=0)
    if PB_RELAX == 0:
        mean = total / C
        scale, unscale, relaxed = 1.0, 1.0, 1.0
    else:
        exponent = peak.to(tl.int32, bitcast=True) >> 23
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        unscale = (exponent << 23).to(tl.float32, bitcast=True)
        relaxed = peak * scale * 0.125
        if tl.abs(total) < 1e37:
            mean = total * scale / C
        else:
            # The sum of values near the largest float overflows unless they are scaled first.
            mean = tl.sum(x * scale, axis=0) / C
        x = x * scale
    centred = tl.where(columns < C, x - mean, 0.0)
    rest, squares = sum_pair(centred, centred * centred)
    rest = rest / C
    variance = tl.maximum(squares / C - rest * rest, 0.0) + eps * relaxed * relaxed
    rstd = tl.where(variance == 0.0, 0.0, tl.rsqrt(variance))
    return (centred - rest) * rstd, (mean + rest) * unscale, tl.minimum(rstd * scale, 3.4028234e38)


@triton.jit
def gradient_through(dy, x, mean, rstd, weight, columns, C):
    """``(dx, dy * xhat)`` with ``g = dy * weight``: ``dx = rstd * (g - mean(g) - xhat * mean(g * xhat))``."""
    xhat = tl.where(columns < C, (x - mean) * rstd, 0.0)
    g = dy * weight
    plain, hat = sum_pair(g, g * xhat)
    return rstd * (g - plain / C - xhat * (hat / C)), dy * xhat


@triton.jit(do_not_specialize=["seed", "threshold"])
def _peaks_kernel(
    x_ptr, peaks_ptr, R, C, seed, threshold, scale, HAS_DROPOUT: tl.constexpr, BLOCK_C: tl.constexpr
):
    """peaks[program] = max |x after dropout| over the program's rows. Bytes: R C elements read."""
    columns = tl.arange(0, BLOCK_C)
    peak = tl.zeros([BLOCK_C], tl.float32)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        x = load_row(x_ptr, row, C, columns)
        if HAS_DROPOUT:
            x = drop(x, row, columns, seed, threshold, scale)
        peak = tl.maximum(peak, tl.abs(x))
    tl.store(peaks_ptr + tl.program_id(0), tl.max(peak, axis=0))


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
    if out0_ptr is not None:
        store_rounded(out0_ptr + columns, value, (columns < C) & (slot == 0), out0_ptr.dtype.element_ty)
    if out1_ptr is not None:
        store_rounded(out1_ptr + columns, value, (columns < C) & (slot == 1), out1_ptr.dtype.element_ty)
    if out2_ptr is not None:
        store_rounded(out2_ptr + columns, value, (columns < C) & (slot == 2), out2_ptr.dtype.element_ty)
    if out3_ptr is not None:
        store_rounded(out3_ptr + columns, value, (columns < C) & (slot == 3), out3_ptr.dtype.element_ty)


def launch_peaks(x: Tensor, threshold: int, scale: float, seed: int | Tensor) -> Tensor:
    """Absolute maxima that together cover ``x`` after dropout, for pb_relax="tensor"."""
    C = x.shape[-1]
    rows = x.numel() // C
    peaks = x.new_empty(programs(rows, x.device, "forward"), dtype=torch.float32)
    _peaks_kernel[(len(peaks),)](
        x, peaks, rows, C, seed, threshold, scale, HAS_DROPOUT=threshold > 0, **tiling(C, "forward")
    )
    return peaks


def peaks_arguments(peaks: Tensor | None) -> dict[str, Any]:
    count = 0 if peaks is None else len(peaks)
    return {"PEAKS": count, "BLOCK_PEAKS": triton.next_power_of_2(max(count, 1))}


def launch_reduce_partials(partials: Tensor, *outs: Tensor | None) -> None:
    """``partials``: [programs, slots, C]."""
    P, slots, C = partials.shape
    block_c = 64
    outs = (*outs, None, None)[:4]
    _reduce_partials_kernel[(triton.cdiv(C, block_c), slots)](
        partials, *outs, P, C, SLOTS=slots, BLOCK_P=32, BLOCK_C=block_c
    )
