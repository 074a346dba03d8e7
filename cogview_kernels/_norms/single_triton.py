# SPDX-License-Identifier: Apache-2.0
"""One norm over rows on NVIDIA GPUs: the kernels of layer_norm and, with RMS, of rms_norm.

Letters: R rows of C elements, each a tuple of pieces of BLOCK_C columns, persistent programs.
Bytes, forward: 2 R C elements (3 under pb_relax="tensor"). Backward: 3 R C. FLOPs: about 10 an element.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels import _checks
from cogview_kernels._norms import rows
from cogview_kernels._norms.rows import Affine, NormOptions
from cogview_kernels._norms.rows_triton import (
    abs_max_programs,
    add_rows,
    affine,
    columns_of,
    empty_partials,
    fill_row,
    gradient_through,
    launch_abs_max,
    launch_reduce_partials,
    load_abs_max,
    load_parameter,
    load_row,
    load_statistics,
    normalise,
    programs,
    save_statistics,
    store_row,
    tiling,
)
from cogview_kernels._triton import Launch, Plans


@triton.jit
def _norm_fwd_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, stats_ptr, abs_maxima_ptr, R, COUNT, eps,
    RMS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, ROUND: tl.constexpr, PB_RELAX: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(variance + eps * (abs_max / 8)^2).

    RMS: y = x * rstd * (WEIGHT_OFFSET + weight), with the mean of squares in place of the variance."""
    columns = columns_of(C, BLOCK_C)
    weight = load_parameter(weight_ptr, C, columns, 1.0, WEIGHT_OFFSET)
    bias = load_parameter(bias_ptr, C, columns, 0.0)
    abs_max = 8.0
    if PB_RELAX == 2:
        abs_max = load_abs_max(abs_maxima_ptr, COUNT)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
        x = load_row(x_ptr, row, C, columns)
        xhat, mean, rstd = normalise(x, C, columns, abs_max, eps, PB_RELAX, RMS)
        y = affine(xhat, weight, bias, C, columns, ROUND, x_ptr.dtype.element_ty)
        store_row(y_ptr, row, y, C, columns)
        save_statistics(stats_ptr, 0, row, R, mean, rstd, RMS)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, stats_ptr, partials_ptr, R,
    RMS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * weight; sums of dy * xhat and of dy.

    RMS: without mean(g) and the sum of dy."""
    columns = columns_of(C, BLOCK_C)
    weight = load_parameter(weight_ptr, C, columns, 1.0, WEIGHT_OFFSET)
    dweight = fill_row(0.0, columns)
    dbias = fill_row(0.0, columns)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
        dy = load_row(dy_ptr, row, C, columns)
        x = load_row(x_ptr, row, C, columns)
        mean, rstd = load_statistics(stats_ptr, 0, row, R, RMS)
        dx, product = gradient_through(dy, x, mean, rstd, weight, C, columns, RMS)
        store_row(dx_ptr, row, dx, C, columns)
        dweight = add_rows(dweight, product)
        if not RMS:
            dbias = add_rows(dbias, dy)
    if partials_ptr is not None:
        if RMS:
            store_row(partials_ptr, tl.program_id(0), dweight, C, columns)
        else:
            store_row(partials_ptr, 2 * tl.program_id(0), dweight, C, columns)
            store_row(partials_ptr, 2 * tl.program_id(0) + 1, dbias, C, columns)


def limit(backend: str, x: Tensor) -> str:
    """Why the kernels cannot take ``x``; empty when they can."""
    return rows.limit(backend, "x", x) or _checks.triton_rows_limit("x", x)


def _plan_forward(R: int, C: int, x: Tensor, options: NormOptions, rms: bool) -> Launch:
    tiles = tiling(C, x.element_size(), 80)
    count = abs_max_programs(R, C, x) if options.pb_relax == "tensor" else 0
    return Launch(
        _norm_fwd_kernel,
        (programs(R, x.device, tiles),),
        (R, count, options.eps),
        RMS=rms,
        WEIGHT_OFFSET=options.weight_offset,
        ROUND=options.round_before_weight,
        PB_RELAX=rows.PB_RELAX_CODES[options.pb_relax],
        **tiles,
    )


_forward_plans: Plans[Launch] = Plans(_plan_forward)


def forward(x: Tensor, y: Tensor, affine: Affine, stats: Tensor, options: NormOptions, *, rms: bool) -> None:
    """Fills ``y`` and ``stats`` ([2, R], with ``rms`` [1, R]); everything is contiguous."""
    C = x.shape[-1]
    R = x.numel() // C
    launch = _forward_plans.get((R, C, x.element_size(), x.device, options, rms), R, C, x, options, rms)
    abs_maxima = launch_abs_max(x, None) if options.pb_relax == "tensor" else None
    launch(x, y, *affine, stats, abs_maxima)


def _plan_backward(R: int, C: int, x: Tensor, weight_offset: float, rms: bool) -> Launch:
    tiles = tiling(C, x.element_size(), 128 if rms else 168)
    grid = (programs(R, x.device, tiles),)
    return Launch(_norm_bwd_kernel, grid, (R,), RMS=rms, WEIGHT_OFFSET=weight_offset, **tiles)


_backward_plans: Plans[Launch] = Plans(_plan_backward)


def backward(
    dy: Tensor,
    x: Tensor,
    dx: Tensor,
    weight: Tensor | None,
    gradients: Affine,
    stats: Tensor,
    *,
    weight_offset: float = 0.0,
    rms: bool,
) -> None:
    """Fills ``dx`` and what there is of ``gradients``; everything is contiguous."""
    C = x.shape[-1]
    R = x.numel() // C
    key = (R, C, x.element_size(), x.device, weight_offset, rms)
    launch = _backward_plans.get(key, R, C, x, weight_offset, rms)
    wanted = gradients[: 1 if rms else 2]
    partials = empty_partials(launch, C, x.device, wanted)
    launch(dy, x, dx, weight, stats, partials)
    launch_reduce_partials(partials, wanted)
