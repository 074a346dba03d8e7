# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.linear_cross_entropy``: registration, fake tensors, and what is saved.

Where the losses are summed, their gradients are made during the forward pass, up to the one factor that the
backward pass brings: three matrix products in all and no logits kept. Where each loss is returned, the
backward pass makes the logits again from what is saved, one number a token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogview_kernels import _library
from cogview_kernels.linear_cross_entropy.chunked import (
    linear_cross_entropy_chunked,
    linear_cross_entropy_chunked_backward,
)

_library.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor coefficient, bool summed, "
    "bool gradients, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_cross_entropy_backward(Tensor hidden, Tensor weight, Tensor target, Tensor lse, "
    "Tensor coefficient, str backend) -> (Tensor, Tensor)"
)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    summed: bool,
    gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, lse, dhidden, dweight = linear_cross_entropy_chunked(
        hidden, weight, target, coefficient, summed and gradients
    )
    return losses.sum() if summed else losses, lse, dhidden, dweight


def _backward(
    hidden: Tensor, weight: Tensor, target: Tensor, lse: Tensor, coefficient: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy_chunked_backward(hidden, weight, target, lse, coefficient)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, coefficient, summed, gradients, backend):
        loss, lse, dhidden, dweight = _library.eager(
            "linear_cross_entropy", hidden, weight, target, coefficient, summed, gradients, backend
        )
        if summed:
            ctx.save_for_backward(dhidden, dweight)
        else:
            ctx.save_for_backward(hidden, weight, target, lse, coefficient)
        ctx.summed, ctx.backend = summed, backend
        ctx.mark_non_differentiable(lse, dhidden, dweight)
        ctx.set_materialize_grads(False)
        return loss, lse, dhidden, dweight

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        none = (None,) * 5
        if dloss is None:
            return None, None, *none
        if ctx.summed:
            dhidden, dweight = ctx.saved_tensors
            # In float32: float16 holds neither a large loss scale nor the inverse of a large sum of weights.
            dtype = dhidden.dtype
            return (dhidden.float() * dloss).to(dtype), (dweight * dloss).to(dtype), *none
        hidden, weight, target, lse, coefficient = ctx.saved_tensors
        dhidden, dweight = _library.eager(
            "linear_cross_entropy_backward", hidden, weight, target, lse, coefficient * dloss, ctx.backend
        )
        return dhidden, dweight, *none


def linear_cross_entropy_op(
    hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor, summed: bool, backend: str
) -> Tensor:
    """By the shortest way to the kernel that differentiates where it must and can be traced."""
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    arguments = (hidden, weight, target, coefficient, summed, gradients, backend)
    if torch.compiler.is_compiling():
        return torch.ops.cogview_kernels.linear_cross_entropy(*arguments)[0]
    if gradients:
        return LinearCrossEntropy.apply(*arguments)[0]
    return _library.eager("linear_cross_entropy", *arguments)[0]


_library.implement("linear_cross_entropy", _forward, LinearCrossEntropy)
_library.implement("linear_cross_entropy_backward", _backward)


@torch.library.register_fake("cogview_kernels::linear_cross_entropy")
def _forward_fake(hidden, weight, target, coefficient, summed, gradients, backend):
    lse = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    loss = hidden.new_empty((), dtype=torch.float32) if summed else torch.empty_like(lse)
    if summed and gradients:
        return loss, lse, torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)
    return loss, lse, hidden.new_empty(0), lse.new_empty(0)


@torch.library.register_fake("cogview_kernels::linear_cross_entropy_backward")
def _backward_fake(hidden, weight, target, lse, coefficient, backend):
    return torch.empty_like(hidden), torch.empty_like(weight)
