# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.sandwich_layer_norm``: registration, fake tensors, and what is saved.

Saved for the backward: the branch, the new residual (an output, so it costs nothing more), the seed, and both
norms' means and reciprocal deviations in float32 (16 bytes a row).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogview_kernels import _extension, _library, _norm

_library.define(
    "sandwich_layer_norm(Tensor branch, Tensor residual, Tensor? post_weight, Tensor? post_bias,"
    " Tensor? pre_weight, Tensor? pre_bias, float eps, str? pb_relax, float dropout_p, Tensor? seed,"
    " str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "sandwich_layer_norm_backward(Tensor? dresidual_out, Tensor? dnormed, Tensor branch, Tensor residual_out,"
    " Tensor stats, Tensor? post_weight, Tensor? post_bias, Tensor? pre_weight, Tensor? pre_bias,"
    " float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    eps: float,
    pb_relax: str | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    C = branch.shape[-1]
    rows = branch.numel() // C
    residual_out = torch.empty_like(branch, memory_format=torch.contiguous_format)
    normed = torch.empty_like(residual_out)
    stats = branch.new_empty((4, rows), dtype=torch.float32)
    if rows == 0:
        return residual_out, normed, stats
    branch, residual = branch.contiguous(), residual.contiguous()
    parameters = tuple(
        None if p is None else p.contiguous() for p in (post_weight, post_bias, pre_weight, pre_bias)
    )
    if backend == "triton":
        from cogview_kernels.sandwich_layer_norm.triton_kernels import launch_sandwich_layer_norm_fwd

        tensors = (branch, residual, residual_out, normed, *parameters, stats)
        launch_sandwich_layer_norm_fwd(tensors, eps, pb_relax, dropout_p, seed)
        return residual_out, normed, stats
    peaks = _norm.peaks(branch, pb_relax, 2) if backend == "cuda" else None
    arguments = (
        *(branch.data_ptr(), residual.data_ptr(), residual_out.data_ptr(), normed.data_ptr()),
        [_norm.parameter(p) for p in parameters],
        stats.data_ptr(),
        (rows, C, _extension.DTYPE_CODES[branch.dtype]),
        (eps, _norm.PB_RELAX_CODES[pb_relax]),
        _norm.dropout(dropout_p, seed),
        (_norm.address(peaks), _norm.blocks(branch)),
    )
    if backend == "cuda":
        _extension.native.sandwich_layer_norm_fwd_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _extension.native.sandwich_layer_norm_fwd_cpu(*arguments, torch.get_num_threads())
    return residual_out, normed, stats


def _backward(
    dresidual_out: Tensor | None,
    dnormed: Tensor | None,
    branch: Tensor,
    residual_out: Tensor,
    stats: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    C = branch.shape[-1]
    rows = branch.numel() // C
    dbranch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    dresidual = torch.empty_like(dbranch)
    parameters = (post_weight, post_bias, pre_weight, pre_bias)
    dpost_weight, dpost_bias, dpre_weight, dpre_bias = (_norm.gradient_of(p, stats) for p in parameters)
    gradients = (dpost_weight, dpost_bias, dpre_weight, dpre_bias)
    if rows == 0:
        for gradient in gradients:
            gradient.zero_()
        return dbranch, dresidual, dpost_weight, dpost_bias, dpre_weight, dpre_bias
    dresidual_out = None if dresidual_out is None else dresidual_out.contiguous()
    dnormed = None if dnormed is None else dnormed.contiguous()
    branch, residual_out = branch.contiguous(), residual_out.contiguous()
    post_weight = None if post_weight is None else post_weight.contiguous()
    pre_weight = None if pre_weight is None else pre_weight.contiguous()
    wanted = [None if p is None else gradient for p, gradient in zip(parameters, gradients, strict=True)]
    if backend == "triton":
        from cogview_kernels.sandwich_layer_norm.triton_kernels import launch_sandwich_layer_norm_bwd

        outer = (dresidual_out, dnormed, branch, residual_out, dbranch, dresidual)
        launch_sandwich_layer_norm_bwd(outer, post_weight, pre_weight, wanted, stats, dropout_p, seed)
        return dbranch, dresidual, dpost_weight, dpost_bias, dpre_weight, dpre_bias
    partials = _norm.partials(branch, 4) if backend == "cuda" else None
    arguments = (
        *[_norm.address(x) for x in (dresidual_out, dnormed, branch, residual_out, dbranch, dresidual)],
        (_norm.parameter(post_weight), _norm.parameter(pre_weight)),
        [_norm.parameter(p) for p in wanted],
        stats.data_ptr(),
        (rows, C, _extension.DTYPE_CODES[branch.dtype]),
        _norm.dropout(dropout_p, seed),
        (_norm.address(partials), _norm.blocks(branch)),
    )
    if backend == "cuda":
        _extension.native.sandwich_layer_norm_bwd_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _extension.native.sandwich_layer_norm_bwd_cpu(*arguments, torch.get_num_threads())
    return dbranch, dresidual, dpost_weight, dpost_bias, dpre_weight, dpre_bias


class SandwichLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, branch, residual, *arguments):
        residual_out, normed, stats = _library.eager("sandwich_layer_norm", branch, residual, *arguments)
        parameters, (_, _, dropout_p, seed, backend) = arguments[:4], arguments[4:]
        ctx.save_for_backward(branch, residual_out, stats, *parameters, seed)
        ctx.dropout_p, ctx.backend = dropout_p, backend
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return residual_out, normed, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dresidual_out, dnormed, _):
        if dresidual_out is None and dnormed is None:
            return (None,) * 11
        *saved, seed = ctx.saved_tensors
        dbranch, dresidual, *gradients = _library.eager(
            "sandwich_layer_norm_backward", dresidual_out, dnormed, *saved, ctx.dropout_p, seed, ctx.backend
        )
        parameters = zip(saved[3:], gradients, strict=True)
        return dbranch, dresidual, *(None if p is None else d for p, d in parameters), *(None,) * 5


def sandwich_layer_norm_op(branch: Tensor, residual: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """By the shortest way to the kernel that differentiates where it must and can be traced."""
    if torch.compiler.is_compiling():
        return torch.ops.cogview_kernels.sandwich_layer_norm(branch, residual, *arguments)[:2]
    tensors = (branch, residual, *arguments[:4])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return SandwichLayerNorm.apply(branch, residual, *arguments)[:2]
    return _library.eager("sandwich_layer_norm", branch, residual, *arguments)[:2]


_library.implement("sandwich_layer_norm", _forward, SandwichLayerNorm)
_library.implement("sandwich_layer_norm_backward", _backward)


@torch.library.register_fake("cogview_kernels::sandwich_layer_norm")
def _forward_fake(branch, residual, *arguments):
    residual_out = torch.empty_like(branch, memory_format=torch.contiguous_format)
    stats = branch.new_empty((4, branch.numel() // branch.shape[-1]), dtype=torch.float32)
    return residual_out, torch.empty_like(residual_out), stats


@torch.library.register_fake("cogview_kernels::sandwich_layer_norm_backward")
def _backward_fake(
    dresidual_out, dnormed, branch, residual_out, stats, post_weight, post_bias, pre_weight, pre_bias, *rest
):
    dbranch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    parameters = (post_weight, post_bias, pre_weight, pre_bias)
    gradients = [_norm.gradient_of(p, stats) for p in parameters]
    return dbranch, torch.empty_like(dbranch), *gradients
