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

from cogview_kernels._norms import rows
from cogview_kernels._norms.rows import Affine, NormOptions
from cogview_kernels._norms.rows_triton import (
    abs_max_programs,
    add_rows,
    affine,
    columns_of,
    fill_row,
    gradient_through,
    launch_abs_max,
    launch_reduce_partials,
    load_abs_max,
    load_parameter,
    load_row,
    normalise,
    programs,
    store_row,
    tiling,
)
from cogview_kernels._triton import Launch, Plans, offset

FORWARD_REGISTERS, BACKWARD_REGISTERS = 80, 168


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, stats_ptr, abs_maxima_ptr, R, COUNT, eps,
    PB_RELAX: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(variance + eps * (abs_max / 8)^2)."""
    columns = columns_of(C, BLOCK_C)
    weight = load_parameter(weight_ptr, C, columns, 1.0)
    bias = load_parameter(bias_ptr, C, columns, 0.0)
    abs_max = 8.0
    if PB_RELAX == 2:
        abs_max = load_abs_max(abs_maxima_ptr, COUNT)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
        x = load_row(x_ptr, row, C, columns)
        xhat, mean, rstd = normalise(x, C, columns, abs_max, eps, PB_RELAX)
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


def limit(backend: str, x: Tensor) -> str:
    """Why the kernels cannot take ``x``; empty when they can."""
    return rows.limit(backend, "x", x)


def _plan_forward(R: int, C: int, x: Tensor, options: NormOptions) -> Launch:
    tiles = tiling(C, x.element_size(), FORWARD_REGISTERS)
    count = abs_max_programs(R, C, x) if options.pb_relax == "tensor" else 0
    return Launch(
        _layer_norm_fwd_kernel,
        (programs(R, x.device, tiles),),
        (R, count, options.eps),
        PB_RELAX=rows.PB_RELAX_CODES[options.pb_relax],
        **tiles,
    )


_forward_plans: Plans[Launch] = Plans(_plan_forward)


def forward(x: Tensor, y: Tensor, affine: Affine, stats: Tensor, options: NormOptions, _: str) -> None:
    """Fills ``y`` and ``stats`` [2, R]; everything is contiguous."""
    C = x.shape[-1]
    R = x.numel() // C
    launch = _forward_plans.get((R, C, x.element_size(), x.device, options), R, C, x, options)
    abs_maxima = launch_abs_max(x, None) if options.pb_relax == "tensor" else None
    launch(x, y, *affine, stats, abs_maxima)


def _plan_backward(R: int, C: int, x: Tensor) -> Launch:
    tiles = tiling(C, x.element_size(), BACKWARD_REGISTERS)
    return Launch(_layer_norm_bwd_kernel, (programs(R, x.device, tiles),), (R,), **tiles)


_backward_plans: Plans[Launch] = Plans(_plan_backward)


def backward(
    dy: Tensor, x: Tensor, dx: Tensor, weight: Tensor | None, gradients: Affine, stats: Tensor, _: str
) -> None:
    """Fills ``dx`` and what there is of ``gradients``; everything is contiguous."""
    C = x.shape[-1]
    R = x.numel() // C
    launch = _backward_plans.get((R, C, x.element_size(), x.device), R, C, x)
    partials = torch.empty((*launch.grid, 2, C), dtype=torch.float32, device=x.device)
    launch(dy, x, dx, weight, stats, partials)
    launch_reduce_partials(partials, *gradients)
