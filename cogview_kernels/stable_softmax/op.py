# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.stable_softmax``: schemas, fake tensors; the output is what is saved."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cogview_kernels._torch_ops import Op
from cogview_kernels.stable_softmax import native


def backend_module(backend: str) -> ModuleType:
    """The module whose ``forward``, ``backward`` and ``limit`` serve ``backend``."""
    if backend == "triton":
        from cogview_kernels.stable_softmax import triton_kernels

        return triton_kernels
    return native


def _forward(
    scores: Tensor, alpha: float, scale: float, mask: Tensor | None, causal: bool, backend: str
) -> Tensor:
    probs = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if probs.numel() > 0:
        if scores.stride(-1) != 1:
            scores = scores.contiguous()
        backend_module(backend).forward(scores, mask, probs, alpha, scale, causal, backend)
    return probs


def _backward(dprobs: Tensor, probs: Tensor, factor: float, backend: str) -> Tensor:
    dprobs, probs = dprobs.contiguous(), probs.contiguous()
    dscores = torch.empty_like(probs)
    if probs.numel() > 0:
        backend_module(backend).backward(dprobs, probs, dscores, factor, backend)
    return dscores


def _save(ctx, arguments, probs):
    _, alpha, scale, _, _, ctx.backend = arguments
    ctx.factor = alpha * scale
    return (probs,)


def _differentiate(ctx, saved, dprobs):
    (probs,) = saved
    return stable_softmax_backward_op(dprobs, probs, ctx.factor, ctx.backend), None, None, None, None, None


def _contiguous_like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


stable_softmax_op = Op(
    "stable_softmax(Tensor scores, float alpha, float scale, Tensor? mask, bool causal, str backend)"
    " -> Tensor",
    kernel=_forward,
    fake=_contiguous_like,
    save=_save,
    backward=_differentiate,
)
stable_softmax_backward_op = Op(
    "stable_softmax_backward(Tensor dprobs, Tensor probs, float factor, str backend) -> Tensor",
    kernel=_backward,
    fake=_contiguous_like,
)
