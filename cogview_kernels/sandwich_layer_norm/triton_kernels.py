# SPDX-License-Identifier: Apache-2.0
"""Sandwich-LayerNorm on NVIDIA GPUs.

Letters: R rows of C elements, each a tuple of pieces of BLOCK_C columns, persistent programs.
Bytes, forward: 4 R C elements (branch and residual read, residual_out and normed written), 6 R C under
pb_relax="tensor": the maximum of branch, and then that of residual_out, must be known before their norm.
Backward: 6 R C (four read, two written). FLOPs: about 20 an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels._dropout import Dropout
from cogview_kernels._norms import rows as shared
from cogview_kernels._norms.rows import NormOptions
from cogview_kernels._norms.rows_triton import (
    abs_max_of_pieces,
    abs_max_programs,
    add_rows,
    affine,
    columns_of,
    drop,
    fill_row,
    gradient_through,
    launch_abs_max,
    launch_reduce_partials,
    load_abs_max,
    load_parameter,
    load_row,
    normalise,
    programs,
    round_row,
    store_row,
    tiling,
)
from cogview_kernels._triton import Launch, Plans, dropout_arguments, offset
from cogview_kernels.sandwich_layer_norm.native import BackwardRows, ForwardRows, Norms

FORWARD_REGISTERS, BACKWARD_REGISTERS = 168, 255


@triton.jit(do_not_specialize=["seed", "keep_threshold"])
def _sandwich_layer_norm_fwd_kernel(
    branch_ptr, residual_ptr, residual_out_ptr, normed_ptr,
    post_weight_ptr, post_bias_ptr, pre_weight_ptr, pre_bias_ptr,
    stats_ptr, abs_maxima_ptr, out_abs_maxima_ptr, seed, R, COUNT, eps, keep_threshold, keep_scale,
    POST: tl.constexpr, PRE: tl.constexpr, PB_RELAX: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """POST: residual_out = residual + LN_post(dropout(branch)). PRE: normed = LN_pre(residual_out).

    Both at once, or, under pb_relax="tensor", one after the other, with the maximum of residual_out over
    each program's rows going from the first to the second through out_abs_maxima and abs_maxima."""
    columns = columns_of(C, BLOCK_C)
    dtype: tl.constexpr = residual_out_ptr.dtype.element_ty
    if POST:
        post_weight = load_parameter(post_weight_ptr, C, columns, 1.0)
        post_bias = load_parameter(post_bias_ptr, C, columns, 0.0)
    if PRE:
        pre_weight = load_parameter(pre_weight_ptr, C, columns, 1.0)
        pre_bias = load_parameter(pre_bias_ptr, C, columns, 0.0)
    abs_max = 8.0
    if PB_RELAX == 2:
        abs_max = load_abs_max(abs_maxima_ptr, COUNT)
        out_abs_max = tl.zeros([BLOCK_C], tl.float32)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
        if POST:
            x = load_row(branch_ptr, row, C, columns)
            residual = load_row(residual_ptr, row, C, columns)
            if HAS_DROPOUT:
                x = drop(x, row, columns, seed, keep_threshold, keep_scale)
            xhat, mean, rstd = normalise(x, C, columns, abs_max, eps, PB_RELAX)
            out = round_row(add_rows(residual, affine(xhat, post_weight, post_bias)), C, columns, dtype)
            store_row(residual_out_ptr, row, out, C, columns)
            tl.store(stats_ptr + row, mean)
            tl.store(stats_ptr + offset(R, 1) + row, rstd)
            if PB_RELAX == 2:
                out_abs_max = tl.maximum(out_abs_max, abs_max_of_pieces(out))
        else:
            out = load_row(residual_out_ptr, row, C, columns)
        if PRE:
            xhat, mean, rstd = normalise(out, C, columns, abs_max, eps, PB_RELAX)
            store_row(normed_ptr, row, affine(xhat, pre_weight, pre_bias), C, columns)
            tl.store(stats_ptr + offset(R, 2) + row, mean)
            tl.store(stats_ptr + offset(R, 3) + row, rstd)
    if POST and PB_RELAX == 2:
        tl.store(out_abs_maxima_ptr + tl.program_id(0), tl.max(out_abs_max, axis=0))


@triton.jit(do_not_specialize=["seed", "keep_threshold"])
def _sandwich_layer_norm_bwd_kernel(
    dresidual_out_ptr, dnormed_ptr, branch_ptr, residual_out_ptr, dbranch_ptr, dresidual_ptr,
    post_weight_ptr, pre_weight_ptr, stats_ptr, partials_ptr, seed, R, keep_threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dresidual = dresidual_out + dLN_pre(dnormed), dbranch = dropout(dLN_post(dresidual)), where with
    g = dy * weight: dLN = rstd * (g - mean(g) - xhat * mean(g * xhat)); partial sums of dy * xhat and dy."""
    columns = columns_of(C, BLOCK_C)
    post_weight = load_parameter(post_weight_ptr, C, columns, 1.0)
    pre_weight = load_parameter(pre_weight_ptr, C, columns, 1.0)
    dpost_weight = fill_row(0.0, columns)
    dpost_bias = fill_row(0.0, columns)
    dpre_weight = fill_row(0.0, columns)
    dpre_bias = fill_row(0.0, columns)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
        trunk = fill_row(0.0, columns)
        if dnormed_ptr is not None:
            dnormed = load_row(dnormed_ptr, row, C, columns)
            out = load_row(residual_out_ptr, row, C, columns)
            mean, rstd = tl.load(stats_ptr + offset(R, 2) + row), tl.load(stats_ptr + offset(R, 3) + row)
            trunk, product = gradient_through(dnormed, out, mean, rstd, pre_weight, C, columns)
            dpre_weight = add_rows(dpre_weight, product)
            dpre_bias = add_rows(dpre_bias, dnormed)
        if dresidual_out_ptr is not None:
            trunk = add_rows(trunk, load_row(dresidual_out_ptr, row, C, columns))
        store_row(dresidual_ptr, row, trunk, C, columns)
        x = load_row(branch_ptr, row, C, columns)
        if HAS_DROPOUT:
            x = drop(x, row, columns, seed, keep_threshold, keep_scale)
        mean, rstd = tl.load(stats_ptr + row), tl.load(stats_ptr + offset(R, 1) + row)
        dx, product = gradient_through(trunk, x, mean, rstd, post_weight, C, columns)
        if HAS_DROPOUT:
            dx = drop(dx, row, columns, seed, keep_threshold, keep_scale)
        store_row(dbranch_ptr, row, dx, C, columns)
        dpost_weight = add_rows(dpost_weight, product)
        dpost_bias = add_rows(dpost_bias, trunk)
    at = 4 * tl.program_id(0)
    store_row(partials_ptr, at, dpost_weight, C, columns)
    store_row(partials_ptr, at + 1, dpost_bias, C, columns)
    store_row(partials_ptr, at + 2, dpre_weight, C, columns)
    store_row(partials_ptr, at + 3, dpre_bias, C, columns)


def limit(backend: str, branch: Tensor) -> str:
    """Why the kernels cannot take ``branch``; empty when they can."""
    return shared.limit(backend, "branch", branch)


def _plan_forward(
    R: int, C: int, branch: Tensor, options: NormOptions, dropout: Dropout | None
) -> tuple[Launch, ...]:
    """One launch, or with the maxima of whole tensors one for each of the two norms."""
    tiles = tiling(C, branch.element_size(), FORWARD_REGISTERS)
    grid = programs(R, branch.device, tiles)
    _, keep_threshold, keep_scale = dropout_arguments(dropout)
    launches = []
    for post, pre in ((True, False), (False, True)) if options.pb_relax == "tensor" else ((True, True),):
        count = 0
        if options.pb_relax == "tensor":
            count = abs_max_programs(R, C, branch) if post else grid
        launches.append(
            Launch(
                _sandwich_layer_norm_fwd_kernel,
                (grid,),
                (R, count, options.eps, keep_threshold, keep_scale),
                POST=post,
                PRE=pre,
                PB_RELAX=shared.PB_RELAX_CODES[options.pb_relax],
                HAS_DROPOUT=dropout is not None,
                **tiles,
            )
        )
    return tuple(launches)


_forward_plans: Plans[tuple[Launch, ...]] = Plans(_plan_forward)


def forward(
    rows: ForwardRows, norms: Norms, stats: Tensor, options: NormOptions, dropout: Dropout | None, _: str
) -> None:
    """Fills ``residual_out``, ``normed`` and ``stats`` [4, R]; everything is contiguous."""
    branch = rows.branch
    C = branch.shape[-1]
    R = branch.numel() // C
    key = (R, C, branch.element_size(), branch.device, options, dropout and dropout.keep_threshold)
    launches = _forward_plans.get(key, R, C, branch, options, dropout)
    seed = dropout_arguments(dropout)[0]
    tensors = (*rows, *norms.post, *norms.pre, stats)
    if len(launches) == 1:
        launches[0](*tensors, None, None, seed=seed)
        return
    first, second = launches
    out_abs_maxima = torch.empty(first.grid, dtype=torch.float32, device=branch.device)
    first(*tensors, launch_abs_max(branch, dropout), out_abs_maxima, seed=seed)
    second(*tensors, out_abs_maxima, out_abs_maxima, seed=seed)


def _plan_backward(R: int, C: int, branch: Tensor, dropout: Dropout | None) -> Launch:
    tiles = tiling(C, branch.element_size(), BACKWARD_REGISTERS)
    _, keep_threshold, keep_scale = dropout_arguments(dropout)
    return Launch(
        _sandwich_layer_norm_bwd_kernel,
        (programs(R, branch.device, tiles),),
        (R, keep_threshold, keep_scale),
        HAS_DROPOUT=dropout is not None,
        **tiles,
    )


_backward_plans: Plans[Launch] = Plans(_plan_backward)


def backward(
    rows: BackwardRows, norms: Norms, gradients: Norms, stats: Tensor, dropout: Dropout | None, _: str
) -> None:
    """Fills ``dbranch``, ``dresidual`` and what there is of ``gradients``; everything is contiguous."""
    branch = rows.branch
    C = branch.shape[-1]
    R = branch.numel() // C
    key = (R, C, branch.element_size(), branch.device, dropout and dropout.keep_threshold)
    launch = _backward_plans.get(key, R, C, branch, dropout)
    partials = torch.empty((*launch.grid, 4, C), dtype=torch.float32, device=branch.device)
    weights = norms.post.weight, norms.pre.weight
    launch(*rows, *weights, stats, partials, seed=dropout_arguments(dropout)[0])
    launch_reduce_partials(partials, *gradients.post, *gradients.pre)
