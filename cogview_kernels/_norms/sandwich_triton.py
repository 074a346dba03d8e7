# SPDX-License-Identifier: Apache-2.0
"""Two norms and the addition between them on NVIDIA GPUs: the kernels of sandwich_layer_norm and, with RMS,
of sandwich_rms_norm, which may end with the addition.

Letters: R rows of C elements, each a tuple of pieces of BLOCK_C columns, persistent programs.
Bytes, forward: 4 R C elements (branch and residual read, residual_out and normed written), 6 R C under
pb_relax="tensor": the maximum of branch, and then that of residual_out, must be known before their norm.
Backward: 6 R C (four read, two written). Without the second norm 3 R C each way. FLOPs: about 20 an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels import _checks
from cogview_kernels._dropout import Dropout
from cogview_kernels._norms import rows as shared
from cogview_kernels._norms.rows import BackwardRows, ForwardRows, NormOptions, Norms
from cogview_kernels._norms.rows_triton import (
    abs_max_of_pieces,
    abs_max_programs,
    add_rows,
    affine,
    columns_of,
    drop,
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
    round_row,
    save_statistics,
    store_row,
    tiling,
)
from cogview_kernels._triton import Launch, Plans, dropout_arguments


@triton.jit(do_not_specialize=["seed", "keep_threshold"])
def _sandwich_fwd_kernel(
    branch_ptr, residual_ptr, residual_out_ptr, normed_ptr,
    post_weight_ptr, post_bias_ptr, pre_weight_ptr, pre_bias_ptr,
    stats_ptr, abs_maxima_ptr, out_abs_maxima_ptr, seed, R, COUNT, eps, keep_threshold, keep_scale,
    POST: tl.constexpr, PRE: tl.constexpr, RMS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
    ROUND: tl.constexpr, PB_RELAX: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """POST: residual_out = residual + norm_post(dropout(branch)). PRE: normed = norm_pre(residual_out).

    Both at once, or, under pb_relax="tensor", one after the other, with the maximum of residual_out over
    each program's rows going from the first to the second through out_abs_maxima and abs_maxima."""
    columns = columns_of(C, BLOCK_C)
    dtype: tl.constexpr = residual_out_ptr.dtype.element_ty
    if POST:
        post_weight = load_parameter(post_weight_ptr, C, columns, 1.0, WEIGHT_OFFSET)
        post_bias = load_parameter(post_bias_ptr, C, columns, 0.0)
    if PRE:
        pre_weight = load_parameter(pre_weight_ptr, C, columns, 1.0, WEIGHT_OFFSET)
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
            xhat, mean, rstd = normalise(x, C, columns, abs_max, eps, PB_RELAX, RMS)
            y = affine(xhat, post_weight, post_bias, C, columns, ROUND, branch_ptr.dtype.element_ty)
            out = round_row(add_rows(residual, y), C, columns, dtype)
            store_row(residual_out_ptr, row, out, C, columns)
            save_statistics(stats_ptr, 0, row, R, mean, rstd, RMS)
            if PB_RELAX == 2:
                out_abs_max = tl.maximum(out_abs_max, abs_max_of_pieces(out))
        else:
            out = load_row(residual_out_ptr, row, C, columns)
        if PRE:
            xhat, mean, rstd = normalise(out, C, columns, abs_max, eps, PB_RELAX, RMS)
            y = affine(xhat, pre_weight, pre_bias, C, columns, ROUND, dtype)
            store_row(normed_ptr, row, y, C, columns)
            save_statistics(stats_ptr, 1, row, R, mean, rstd, RMS)
    if POST and PB_RELAX == 2:
        tl.store(out_abs_maxima_ptr + tl.program_id(0), tl.max(out_abs_max, axis=0))


@triton.jit(do_not_specialize=["seed", "keep_threshold"])
def _sandwich_bwd_kernel(
    branch_ptr, dbranch_ptr, dresidual_out_ptr, dnormed_ptr, residual_out_ptr, dresidual_ptr,
    post_weight_ptr, pre_weight_ptr, stats_ptr, partials_ptr, seed, R, keep_threshold, keep_scale,
    RMS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, SLOTS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dresidual = dresidual_out + dnorm_pre(dnormed), dbranch = dropout(dnorm_post(dresidual)), where with
    g = dy * weight: dnorm = rstd * (g - mean(g) - xhat * mean(g * xhat)); partial sums of dy * xhat and dy.

    RMS: without mean(g) and the sums of dy. dresidual_ptr is None where there is no norm_pre."""
    columns = columns_of(C, BLOCK_C)
    post_weight = load_parameter(post_weight_ptr, C, columns, 1.0, WEIGHT_OFFSET)
    pre_weight = load_parameter(pre_weight_ptr, C, columns, 1.0, WEIGHT_OFFSET)
    dpost_weight = fill_row(0.0, columns)
    dpost_bias = fill_row(0.0, columns)
    dpre_weight = fill_row(0.0, columns)
    dpre_bias = fill_row(0.0, columns)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=STAGES):
        trunk = fill_row(0.0, columns)
        if dnormed_ptr is not None:
            dnormed = load_row(dnormed_ptr, row, C, columns)
            out = load_row(residual_out_ptr, row, C, columns)
            mean, rstd = load_statistics(stats_ptr, 1, row, R, RMS)
            trunk, product = gradient_through(dnormed, out, mean, rstd, pre_weight, C, columns, RMS)
            dpre_weight = add_rows(dpre_weight, product)
            if not RMS:
                dpre_bias = add_rows(dpre_bias, dnormed)
        if dresidual_out_ptr is not None:
            trunk = add_rows(trunk, load_row(dresidual_out_ptr, row, C, columns))
        if dresidual_ptr is not None:
            store_row(dresidual_ptr, row, trunk, C, columns)
        x = load_row(branch_ptr, row, C, columns)
        if HAS_DROPOUT:
            x = drop(x, row, columns, seed, keep_threshold, keep_scale)
        mean, rstd = load_statistics(stats_ptr, 0, row, R, RMS)
        dx, product = gradient_through(trunk, x, mean, rstd, post_weight, C, columns, RMS)
        if HAS_DROPOUT:
            dx = drop(dx, row, columns, seed, keep_threshold, keep_scale)
        store_row(dbranch_ptr, row, dx, C, columns)
        dpost_weight = add_rows(dpost_weight, product)
        if not RMS:
            dpost_bias = add_rows(dpost_bias, trunk)
    if partials_ptr is not None:
        at = SLOTS * tl.program_id(0)
        store_row(partials_ptr, at, dpost_weight, C, columns)
        if RMS:
            if SLOTS == 2:
                store_row(partials_ptr, at + 1, dpre_weight, C, columns)
        else:
            store_row(partials_ptr, at + 1, dpost_bias, C, columns)
            store_row(partials_ptr, at + 2, dpre_weight, C, columns)
            store_row(partials_ptr, at + 3, dpre_bias, C, columns)


def limit(backend: str, branch: Tensor) -> str:
    """Why the kernels cannot take ``branch``; empty when they can."""
    return shared.limit(backend, "branch", branch) or _checks.triton_rows_limit("branch", branch)


def _plan_forward(
    R: int, C: int, rows: ForwardRows, options: NormOptions, dropout: Dropout | None, rms: bool
) -> tuple[Launch, ...]:
    """One launch, or with the maxima of whole tensors one for each of the two norms."""
    device = rows.branch.device
    tiles = tiling(C, rows.residual.element_size(), 128 if rms else 168)
    grid = programs(R, device, tiles)
    _, keep_threshold, keep_scale = dropout_arguments(dropout)
    parts = [(True, rows.normed is not None)]
    if options.pb_relax == "tensor":
        parts = [(True, False), (False, True)][: 1 if rows.normed is None else 2]
    launches = []
    for post, pre in parts:
        count = 0
        if options.pb_relax == "tensor":
            count = abs_max_programs(R, C, rows.branch) if post else grid
        launches.append(
            Launch(
                _sandwich_fwd_kernel,
                (grid,),
                (R, count, options.eps, keep_threshold, keep_scale),
                POST=post,
                PRE=pre,
                RMS=rms,
                WEIGHT_OFFSET=options.weight_offset,
                ROUND=options.round_before_weight,
                PB_RELAX=shared.PB_RELAX_CODES[options.pb_relax],
                HAS_DROPOUT=dropout is not None,
                **tiles,
            )
        )
    return tuple(launches)


_forward_plans: Plans[tuple[Launch, ...]] = Plans(_plan_forward)


def forward(
    rows: ForwardRows,
    norms: Norms,
    stats: Tensor,
    options: NormOptions,
    dropout: Dropout | None,
    *,
    rms: bool,
) -> None:
    """Fills ``residual_out``, ``normed`` and ``stats`` ([4, R], with ``rms`` a row for each norm); everything
    is contiguous."""
    branch = rows.branch
    C = branch.shape[-1]
    R = branch.numel() // C
    sizes = branch.element_size(), rows.residual.element_size()
    kind = rms, rows.normed is None, dropout and dropout.keep_threshold
    key = (R, C, sizes, branch.device, options, kind)
    launches = _forward_plans.get(key, R, C, rows, options, dropout, rms)
    seed = dropout_arguments(dropout)[0]
    tensors = (*rows, *norms.post, *norms.pre, stats)
    if options.pb_relax != "tensor":
        launches[0](*tensors, None, None, seed=seed)
        return
    out_abs_maxima = torch.empty(launches[0].grid, dtype=torch.float32, device=branch.device)
    launches[0](*tensors, launch_abs_max(branch, dropout), out_abs_maxima, seed=seed)
    for launch in launches[1:]:
        launch(*tensors, out_abs_maxima, out_abs_maxima, seed=seed)


def _plan_backward(
    R: int, C: int, rows: BackwardRows, weight_offset: float, dropout: Dropout | None, rms: bool
) -> Launch:
    # Without biases and dropout a row takes fewer registers, and a third program is resident.
    tiles = tiling(C, rows.trunk().element_size(), 168 if rms and dropout is None else 255)
    _, keep_threshold, keep_scale = dropout_arguments(dropout)
    return Launch(
        _sandwich_bwd_kernel,
        (programs(R, rows.branch.device, tiles),),
        (R, keep_threshold, keep_scale),
        RMS=rms,
        WEIGHT_OFFSET=weight_offset,
        SLOTS=4 if not rms else 1 if rows.dresidual is None else 2,
        HAS_DROPOUT=dropout is not None,
        **tiles,
    )


_backward_plans: Plans[Launch] = Plans(_plan_backward)


def backward(
    rows: BackwardRows,
    norms: Norms,
    gradients: Norms,
    stats: Tensor,
    dropout: Dropout | None,
    *,
    weight_offset: float = 0.0,
    rms: bool,
) -> None:
    """Fills ``dbranch``, ``dresidual`` and what there is of ``gradients``; everything is contiguous."""
    branch = rows.branch
    C = branch.shape[-1]
    R = branch.numel() // C
    sizes = branch.element_size(), rows.trunk().element_size()
    kind = rms, rows.dresidual is None, dropout and dropout.keep_threshold
    key = (R, C, sizes, branch.device, weight_offset, kind)
    launch = _backward_plans.get(key, R, C, rows, weight_offset, dropout, rms)
    if rms:
        wanted = (gradients.post.weight, gradients.pre.weight)[: launch.constants["SLOTS"]]
    else:
        wanted = (*gradients.post, *gradients.pre)
    partials = empty_partials(launch, C, branch.device, wanted)
    # The branch goes first: a launch takes its stream from the first tensor, and gradients may be None.
    launch(
        branch,
        rows.dbranch,
        rows.dresidual_out,
        rows.dnormed,
        rows.residual_out,
        rows.dresidual,
        norms.post.weight,
        norms.pre.weight,
        stats,
        partials,
        seed=dropout_arguments(dropout)[0],
    )
    launch_reduce_partials(partials, wanted)
