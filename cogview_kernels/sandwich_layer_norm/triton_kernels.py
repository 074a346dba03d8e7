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

from cogview_kernels._norm import PB_RELAX_CODES, dropout
from cogview_kernels._norm_triton import (
    add_rows,
    affine,
    columns_of,
    drop,
    fill_row,
    gradient_through,
    launch_peaks,
    launch_reduce_partials,
    load_parameter,
    load_peak,
    load_row,
    normalise,
    peak_of_pieces,
    programs,
    round_row,
    seed_argument,
    store_row,
    tiling,
)
from cogview_kernels._triton import offset

FORWARD_REGISTERS, BACKWARD_REGISTERS = 168, 255


@triton.jit(do_not_specialize=["seed", "threshold"])
def _sandwich_layer_norm_fwd_kernel(
    branch_ptr, residual_ptr, residual_out_ptr, normed_ptr,
    post_weight_ptr, post_bias_ptr, pre_weight_ptr, pre_bias_ptr,
    stats_ptr, peaks_ptr, out_peaks_ptr, R, PEAKS, eps, seed, threshold, scale,
    POST: tl.constexpr, PRE: tl.constexpr, PB_RELAX: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """POST: residual_out = residual + LN_post(dropout(branch)). PRE: normed = LN_pre(residual_out).

    Both at once, or, under pb_relax="tensor", one after the other, with the maximum of residual_out over
    each program's rows going from the first to the second through out_peaks and peaks."""
    columns = columns_of(C, BLOCK_C)
    dtype: tl.constexpr = residual_out_ptr.dtype.element_ty
    if POST:
        post_weight = load_parameter(post_weight_ptr, C, columns, 1.0)
        post_bias = load_parameter(post_bias_ptr, C, columns, 0.0)
    if PRE:
        pre_weight = load_parameter(pre_weight_ptr, C, columns, 1.0)
        pre_bias = load_parameter(pre_bias_ptr, C, columns, 0.0)
    peak = 8.0
    if PB_RELAX == 2:
        peak = load_peak(peaks_ptr, PEAKS)
        out_peak = tl.zeros([BLOCK_C], tl.float32)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
        if POST:
            x = load_row(branch_ptr, row, C, columns)
            residual = load_row(residual_ptr, row, C, columns)
            if HAS_DROPOUT:
                x = drop(x, row, columns, seed, threshold, scale)
            xhat, mean, rstd = normalise(x, C, columns, peak, eps, PB_RELAX)
            out = round_row(add_rows(residual, affine(xhat, post_weight, post_bias)), C, columns, dtype)
            store_row(residual_out_ptr, row, out, C, columns)
            tl.store(stats_ptr + row, mean)
            tl.store(stats_ptr + offset(R, 1) + row, rstd)
            if PB_RELAX == 2:
                out_peak = tl.maximum(out_peak, peak_of_pieces(out))
        else:
            out = load_row(residual_out_ptr, row, C, columns)
        if PRE:
            xhat, mean, rstd = normalise(out, C, columns, peak, eps, PB_RELAX)
            store_row(normed_ptr, row, affine(xhat, pre_weight, pre_bias), C, columns)
            tl.store(stats_ptr + offset(R, 2) + row, mean)
            tl.store(stats_ptr + offset(R, 3) + row, rstd)
    if POST and PB_RELAX == 2:
        tl.store(out_peaks_ptr + tl.program_id(0), tl.max(out_peak, axis=0))


@triton.jit(do_not_specialize=["seed", "threshold"])
def _sandwich_layer_norm_bwd_kernel(
    dresidual_out_ptr, dnormed_ptr, branch_ptr, residual_out_ptr, dbranch_ptr, dresidual_ptr,
    post_weight_ptr, pre_weight_ptr, stats_ptr, partials_ptr, R, seed, threshold, scale,
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
            x = drop(x, row, columns, seed, threshold, scale)
        mean, rstd = tl.load(stats_ptr + row), tl.load(stats_ptr + offset(R, 1) + row)
        dx, product = gradient_through(trunk, x, mean, rstd, post_weight, C, columns)
        if HAS_DROPOUT:
            dx = drop(dx, row, columns, seed, threshold, scale)
        store_row(dbranch_ptr, row, dx, C, columns)
        dpost_weight = add_rows(dpost_weight, product)
        dpost_bias = add_rows(dpost_bias, trunk)
    at = 4 * tl.program_id(0)
    store_row(partials_ptr, at, dpost_weight, C, columns)
    store_row(partials_ptr, at + 1, dpost_bias, C, columns)
    store_row(partials_ptr, at + 2, dpre_weight, C, columns)
    store_row(partials_ptr, at + 3, dpre_bias, C, columns)


def launch_sandwich_layer_norm_fwd(
    tensors: tuple[Tensor | None, ...],
    eps: float,
    pb_relax: str | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """``tensors``: branch, residual, residual_out, normed, four parameters (or None), stats of [4, R]; all
    contiguous."""
    *rows, post_weight, post_bias, pre_weight, pre_bias, stats = tensors
    branch, residual, residual_out, normed = rows
    assert branch is not None
    C = branch.shape[-1]
    R = branch.numel() // C
    threshold, scale, _, _ = dropout(dropout_p, seed)
    key = seed_argument(seed)
    tiles = tiling(C, branch.element_size(), FORWARD_REGISTERS)
    grid = programs(R, branch.device, tiles)
    peaks = out_peaks = None
    if pb_relax == "tensor":
        peaks = launch_peaks(branch, threshold, scale, key)
        out_peaks = torch.empty(grid, dtype=torch.float32, device=branch.device)
    passes = ((True, False), (False, True)) if pb_relax == "tensor" else ((True, True),)
    for post, pre in passes:
        given = peaks if post else out_peaks
        _sandwich_layer_norm_fwd_kernel[(grid,)](
            branch, residual, residual_out, normed, post_weight, post_bias, pre_weight, pre_bias,
            stats, given, out_peaks, R, 0 if given is None else len(given), eps, key, threshold, scale,
            POST=post, PRE=pre, PB_RELAX=PB_RELAX_CODES[pb_relax], HAS_DROPOUT=threshold > 0, **tiles,
        )  # fmt: skip


def launch_sandwich_layer_norm_bwd(
    tensors: tuple[Tensor | None, ...],
    post_weight: Tensor | None,
    pre_weight: Tensor | None,
    gradients: list[Tensor | None],
    stats: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """``tensors``: dresidual_out and dnormed (either may be None), branch, residual_out, dbranch, dresidual;
    ``gradients``: of the four parameters, None where not wanted. All contiguous."""
    dresidual_out, dnormed, branch, residual_out, dbranch, dresidual = tensors
    assert branch is not None
    C = branch.shape[-1]
    R = branch.numel() // C
    threshold, scale, _, _ = dropout(dropout_p, seed)
    tiles = tiling(C, branch.element_size(), BACKWARD_REGISTERS)
    grid = programs(R, branch.device, tiles)
    partials = torch.empty((grid, 4, C), dtype=torch.float32, device=branch.device)
    _sandwich_layer_norm_bwd_kernel[(grid,)](
        dresidual_out, dnormed, branch, residual_out, dbranch, dresidual, post_weight, pre_weight,
        stats, partials, R, seed_argument(seed), threshold, scale,
        HAS_DROPOUT=threshold > 0, **tiles,
    )  # fmt: skip
    if any(g is not None for g in gradients):
        launch_reduce_partials(partials, *gradients)
