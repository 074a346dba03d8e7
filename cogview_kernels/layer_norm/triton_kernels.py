# SPDX-License-Identifier: Apache-2.0
"""LayerNorm on NVIDIA GPUs.

Letters: R rows of C elements, each a tuple of pieces of BLOCK_C columns, persistent programs.
Bytes, forward: 2 R C elements (3 under pb_relax="tensor"). Backward: 3 R C. FLOPs: about 10 an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels._norm import PB_RELAX_CODES
from cogview_kernels._norm_triton import (
    add_rows,
    affine,
    columns_of,
    fill_row,
    gradient_through,
    launch_peaks,
    launch_reduce_partials,
    load_parameter,
    load_peak,
    load_row,
    normalise,
    programs,
    store_row,
    tiling,
)
from cogview_kernels._triton import offset

FORWARD_REGISTERS, BACKWARD_REGISTERS = 80, 168


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, stats_ptr, peaks_ptr, R, PEAKS, eps,
    PB_RELAX: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(variance + eps * (peak / 8)^2)."""
    columns = columns_of(C, BLOCK_C)
    weight = load_parameter(weight_ptr, C, columns, 1.0)
    bias = load_parameter(bias_ptr, C, columns, 0.0)
    peak = 8.0
    if PB_RELAX == 2:
        peak = load_peak(peaks_ptr, PEAKS)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
        x = load_row(x_ptr, row, C, columns)
        xhat, mean, rstd = normalise(x, C, columns, peak, eps, PB_RELAX)
        store_row(y_ptr, row, affine(xhat, weight, bias), C, columns)
        tl.store(stats_ptr + row, mean)
        tl.store(stats_ptr + offset(R, 1) + row, rstd)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, stats_ptr, partials_ptr, R,
    C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * weight; sums of dy * xhat and of dy."""
    columns = columns_of(C, BLOCK_C)
    weight = load_parameter(weight_ptr, C, columns, 1.0)
    dweight = fill_row(0.0, columns)
    dbias = fill_row(0.0, columns)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
        dy = load_row(dy_ptr, row, C, columns)
        x = load_row(x_ptr, row, C, columns)
        mean, rstd = tl.load(stats_ptr + row), tl.load(stats_ptr + offset(R, 1) + row)
        dx, product = gradient_through(dy, x, mean, rstd, weight, C, columns)
        store_row(dx_ptr, row, dx, C, columns)
        dweight = add_rows(dweight, product)
        dbias = add_rows(dbias, dy)
    store_row(partials_ptr, 2 * tl.program_id(0), dweight, C, columns)
    store_row(partials_ptr, 2 * tl.program_id(0) + 1, dbias, C, columns)


def launch_layer_norm_fwd(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    eps: float,
    pb_relax: str | None,
) -> None:
    """All contiguous; ``stats`` is [2, R]."""
    C = x.shape[-1]
    R = x.numel() // C
    peaks = launch_peaks(x, 0, 1.0, 0) if pb_relax == "tensor" else None
    tiles = tiling(C, x.element_size(), FORWARD_REGISTERS)
    _layer_norm_fwd_kernel[(programs(R, x.device, tiles),)](
        x, y, weight, bias, stats, peaks, R, 0 if peaks is None else len(peaks), eps,
        PB_RELAX=PB_RELAX_CODES[pb_relax], **tiles,
    )  # fmt: skip


def launch_layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    dx: Tensor,
    weight: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    stats: Tensor,
) -> None:
    """All contiguous; gradients of parameters may be None."""
    C = x.shape[-1]
    R = x.numel() // C
    tiles = tiling(C, x.element_size(), BACKWARD_REGISTERS)
    grid = programs(R, x.device, tiles)
    partials = torch.empty((grid, 2, C), dtype=torch.float32, device=x.device)
    _layer_norm_bwd_kernel[(grid,)](dy, x, dx, weight, stats, partials, R, **tiles)
    if dweight is not None or dbias is not None:
        launch_reduce_partials(partials, dweight, dbias)
