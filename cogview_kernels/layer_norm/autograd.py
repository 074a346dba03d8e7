# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.layer_norm``: registration, fake tensors, and what is saved.

Saved for the backward: the input, and each row's mean and reciprocal deviation in float32 (8 bytes a row).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogview_kernels import _extension, _library, _norm

_library.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, str? pb_relax, str backend)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, pb_relax: str | None, backend: str
) -> tuple[Tensor, Tensor]:
    C = x.shape[-1]
    rows = x.numel() // C
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    stats = x.new_empty((2, rows), dtype=torch.float32)
    if rows == 0:
        return y, stats
    x = x.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if backend == "triton":
        from cogview_kernels.layer_norm.triton_kernels import launch_layer_norm_fwd

        launch_layer_norm_fwd(x, y, weight, bias, stats, eps, pb_relax)
        return y, stats
    peaks = _norm.peaks(x, pb_relax, 1) if backend == "cuda" else None
    arguments = (
        x.data_ptr(),
        y.data_ptr(),
        _norm.parameter(weight),
        _norm.parameter(bias),
        stats.data_ptr(),
        (rows, C, _extension.DTYPE_CODES[x.dtype]),
        (eps, _norm.PB_RELAX_CODES[pb_relax]),
        (_norm.address(peaks), _norm.blocks(x)),
    )
    if backend == "cuda":
        _extension.native.layer_norm_fwd_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _extension.native.layer_norm_fwd_cpu(*arguments, torch.get_num_threads())
    return y, stats


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    C = x.shape[-1]
    rows = x.numel() // C
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight, dbias = _norm.gradient_of(weight, stats), _norm.gradient_of(bias, stats)
    if rows == 0:
        return dx, dweight.zero_(), dbias.zero_()
    dy, x = dy.contiguous(), x.contiguous()
    wanted = None if weight is None else dweight, None if bias is None else dbias
    weight = None if weight is None else weight.contiguous()
    if backend == "triton":
        from cogview_kernels.layer_norm.triton_kernels import launch_layer_norm_bwd

        launch_layer_norm_bwd(dy, x, dx, weight, *wanted, stats)
        return dx, dweight, dbias
    partials = _norm.partials(x, 2) if backend == "cuda" else None
    arguments = (
        dy.data_ptr(),
        x.data_ptr(),
        dx.data_ptr(),
        _norm.parameter(weight),
        _norm.parameter(wanted[0]),
        _norm.parameter(wanted[1]),
        stats.data_ptr(),
        (rows, C, _extension.DTYPE_CODES[x.dtype]),
        (_norm.address(partials), _norm.blocks(x)),
    )
    if backend == "cuda":
        _extension.native.layer_norm_bwd_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _extension.native.layer_norm_bwd_cpu(*arguments, torch.get_num_threads())
    return dx, dweight, dbias


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, pb_relax, backend):
        y, stats = _library.eager("layer_norm", x, weight, bias, eps, pb_relax, backend)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.backend = backend
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        x, weight, bias, stats = ctx.saved_tensors
        dx, dweight, dbias = _library.eager("layer_norm_backward", dy, x, weight, bias, stats, ctx.backend)
        return (
            dx,
            None if weight is None else dweight,
            None if bias is None else dbias,
            *(None,) * 3,
        )


def layer_norm_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, pb_relax: str | None, backend: str
) -> Tensor:
    """By the shortest way to the kernel that differentiates where it must and can be traced."""
    arguments = (x, weight, bias, eps, pb_relax, backend)
    if torch.compiler.is_compiling():
        return torch.ops.cogview_kernels.layer_norm(*arguments)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return LayerNorm.apply(*arguments)[0]
    return _library.eager("layer_norm", *arguments)[0]


_library.implement("layer_norm", _forward, LayerNorm)
_library.implement("layer_norm_backward", _backward)


@torch.library.register_fake("cogview_kernels::layer_norm")
def _forward_fake(x, weight, bias, eps, pb_relax, backend):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)


@torch.library.register_fake("cogview_kernels::layer_norm_backward")
def _backward_fake(dy, x, weight, bias, stats, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, _norm.gradient_of(weight, stats), _norm.gradient_of(bias, stats)
