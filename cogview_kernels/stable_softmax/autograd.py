# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.stable_softmax``: registration, fake tensors; the output is what is saved."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogview_kernels import _extension, _library

_library.define(
    "stable_softmax(Tensor scores, float alpha, float scale, Tensor? mask, bool causal, str backend)"
    " -> Tensor"
)
_library.define("stable_softmax_backward(Tensor dprobs, Tensor probs, float factor, str backend) -> Tensor")


def _four(values: tuple[int, ...], missing: int) -> tuple[int, ...]:
    return (missing,) * (4 - len(values)) + values


def _fold(x: Tensor) -> Tensor:
    """Kernels know ``[A, B, T, N]``: more leading dimensions are folded into the first."""
    return x.flatten(0, x.dim() - 4) if x.dim() > 4 else x


def _forward(
    scores: Tensor, alpha: float, scale: float, mask: Tensor | None, causal: bool, backend: str
) -> Tensor:
    probs = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if probs.numel() == 0:
        return probs
    if mask is not None:
        mask = _fold(mask.expand(scores.shape))
    scores = _fold(scores)
    if scores.stride(-1) != 1:
        scores = scores.contiguous()
    # Shapes and strides as plain numbers: making a view of a tensor costs more than all of this.
    shape, scores_stride = _four(tuple(scores.shape), 1), _four(scores.stride(), 0)
    mask_stride = (0, 0, 0, 0) if mask is None else _four(mask.stride(), 0)
    if backend == "triton":
        from cogview_kernels.stable_softmax.triton_kernels import launch_stable_softmax_fwd

        launch_stable_softmax_fwd(
            scores, mask, probs, shape, scores_stride, mask_stride, alpha, scale, causal
        )
        return probs
    arguments = (
        scores.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        probs.data_ptr(),
        shape,
        scores_stride,
        mask_stride,
        alpha,
        scale,
        causal,
        _extension.DTYPE_CODES[scores.dtype],
    )
    if backend == "cuda":
        _extension.native.stable_softmax_fwd_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _extension.native.stable_softmax_fwd_cpu(*arguments, torch.get_num_threads())
    return probs


def _backward(dprobs: Tensor, probs: Tensor, factor: float, backend: str) -> Tensor:
    dprobs, probs = dprobs.contiguous(), probs.contiguous()
    dscores = torch.empty_like(probs)
    if probs.numel() == 0:
        return dscores
    if backend == "triton":
        from cogview_kernels.stable_softmax.triton_kernels import launch_stable_softmax_bwd

        launch_stable_softmax_bwd(dprobs, probs, dscores, factor)
        return dscores
    N = probs.shape[-1]
    arguments = (
        dprobs.data_ptr(),
        probs.data_ptr(),
        dscores.data_ptr(),
        probs.numel() // N,
        N,
        factor,
        _extension.DTYPE_CODES[probs.dtype],
    )
    if backend == "cuda":
        _extension.native.stable_softmax_bwd_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _extension.native.stable_softmax_bwd_cpu(*arguments, torch.get_num_threads())
    return dscores


class StableSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, alpha, scale, mask, causal, backend):
        probs = _library.eager("stable_softmax", scores, alpha, scale, mask, causal, backend)
        ctx.save_for_backward(probs)
        ctx.factor, ctx.backend = alpha * scale, backend
        return probs

    @staticmethod
    @once_differentiable
    def backward(ctx, dprobs):
        (probs,) = ctx.saved_tensors
        dscores = _library.eager("stable_softmax_backward", dprobs, probs, ctx.factor, ctx.backend)
        return dscores, None, None, None, None, None


def stable_softmax_op(
    scores: Tensor, alpha: float, scale: float, mask: Tensor | None, causal: bool, backend: str
) -> Tensor:
    """By the shortest way to the kernel that differentiates where it must and can be traced."""
    arguments = (scores, alpha, scale, mask, causal, backend)
    if torch.compiler.is_compiling():
        return torch.ops.cogview_kernels.stable_softmax(*arguments)
    if scores.requires_grad and torch.is_grad_enabled():
        return StableSoftmax.apply(*arguments)
    return _library.eager("stable_softmax", *arguments)


_library.implement("stable_softmax", _forward, StableSoftmax)
_library.implement("stable_softmax_backward", _backward)


@torch.library.register_fake("cogview_kernels::stable_softmax")
def _forward_fake(scores, alpha, scale, mask, causal, backend):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.register_fake("cogview_kernels::stable_softmax_backward")
def _backward_fake(dprobs, probs, factor, backend):
    return torch.empty_like(probs, memory_format=torch.contiguous_format)
