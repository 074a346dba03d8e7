# SPDX-License-Identifier: Apache-2.0
"""LayerNorm on NVIDIA GPUs.

Letters: R rows of C elements, BLOCK_C >= C columns a tile, one row a tile, persistent programs.
Bytes, forward: 2 R C elements (3 under pb_relax="tensor"). Backward: 3 R C. FLOPs: about 10 an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels._norm import PB_RELAX_CODES
from cogview_kernels._norm_triton import (
    gradient_through,
    launch_peaks,
    launch_reduce_partials,
    load_parameter,
    load_peak,
    load_row,
    normalise,
    peaks_arguments,
    programs,
    tiling,
)
from cogview_kernels._triton import offset, store_rounded


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, stats_ptr, peaks_ptr, R, C, eps,
    PB_RELAX: tl.constexpr, PEAKS: tl.constexpr, BLOCK_PEAKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(variance + eps * (peak / 8)^2)."""
    columns = tl.arange(0, BLOCK_C)
    weight = load_parameter(weight_ptr, columns, C, 1.0, BLOCK_C)
    bias = load_parameter(bias_ptr, columns, C, 0.0, BLOCK_C)
    peak = 8.0
    if PB_RELAX == 2:
        peak = load_peak(peaks_ptr, PEAKS, BLOCK_PEAKS)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=2):
        x = load_row(x_ptr, row, C, columns)
        xhat, mean, rstd = normalise(x, columns, C, peak, eps, PB_RELAX)
        y = xhat * weight + bias
        store_rounded(y_ptr + offset(row, C) + columns, y, columns < C, y_ptr.dtype.element_ty)
        tl.store(stats_ptr + row, mean)
        tl.store(stats_ptr + offset(R, 1) + row, rstd)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, stats_ptr, partials_ptr, R, C, BLOCK_C: tl.constexpr
):
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * weight; sums of dy * xhat and of dy."""
    columns = tl.arange(0, BLOCK_C)
    weight = load_parameter(weight_ptr, columns, C, 1.0, BLOCK_C)
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=2):
        dy = load_row(dy_ptr, row, C, columns)
        x = load_row(x_ptr, row, C, columns)
        mean, rstd = tl.load(stats_ptr + row), tl.load(stats_ptr + offset(R, 1) + row)
        dx, product = gradient_through(dy, x, mean, rstd, weight, columns, C)
        store_rounded(dx_ptr + offset(row, C) + columns, dx, columns < C, dx_ptr.dtype.element_ty)
        dweight += product
        dbias += dy
    at = partials_ptr + offset(2 * tl.program_id(0), C) + columns
    tl.store(at, dweight, mask=columns < C)
    tl.store(at + C, dbias, mask=columns < C)


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
    _layer_norm_fwd_kernel[(programs(R, x.device, "forward"),)](
        x, y, weight, bias, stats, peaks, R, C, eps,
        PB_RELAX=PB_RELAX_CODES[pb_relax], **peaks_arguments(peaks), **tiling(C, "forward"),
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
    grid = programs(R, x.device, "backward")
    partials = torch.empty((grid, 2, C), dtype=torch.float32, device=x.device)
    _layer_norm_bwd_kernel[(grid,)](dy, x, dx, weight, stats, partials, R, C, **tiling(C, "backward"))
    if dweight is not None or dbias is not None:
        launch_reduce_partials(partials, dweight, dbias)
