# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.linear_cross_entropy``: registration, fake tensors, and what is saved.

Where the losses are summed, the gradients are made during the forward pass, up to the one factor that the
backward pass brings: three matrix products in all and no logits kept. Where each loss is returned, its
factor is known in the backward pass only, and the logits are made again there: four products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogview_kernels import _library
from cogview_kernels.linear_cross_entropy.chunked import linear_cross_entropy_chunked

_library.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor coefficient, bool summed, "
    "bool gradients, str backend) -> (Tensor, Tensor, Tensor)"
)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    summed: bool,
    gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = gradients and summed
    losses, dhidden, dweight = linear_cross_entropy_chunked(hidden, weight, target, coefficient, gradients)
    return losses.sum() if summed else losses, dhidden, dweight


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, coefficient, summed, gradients, backend):
        loss, dhidden, dweight = _library.eager(
            "linear_cross_entropy", hidden, weight, target, coefficient, summed, gradients, backend
        )
        saved = (dhidden, dweight) if summed else (hidden, weight, target, coefficient)
        ctx.save_for_backward(*saved)
        ctx.summed, ctx.backend, ctx.dtype = summed, backend, hidden.dtype
        ctx.mark_non_differentiable(dhidden, dweight)
        ctx.set_materialize_grads(False)
        return loss, dhidden, dweight

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 7
        if ctx.summed:
            (dhidden, dweight), factor = ctx.saved_tensors, dloss
        else:
            hidden, weight, target, coefficient = ctx.saved_tensors
            coefficient = coefficient * dloss
            # Scaled to 1 for the way through float16, which loses factors of 1/N below its range.
            factor = coefficient.abs().amax() if coefficient.numel() else coefficient.sum()
            coefficient = coefficient / torch.where(factor == 0, 1, factor)
            _, dhidden, dweight = _library.eager(
                "linear_cross_entropy", hidden, weight, target, coefficient, True, True, ctx.backend
            )
        # In float32: float16 holds neither a large loss scale nor the inverse of a large sum of weights.
        dhidden, dweight = (dhidden.float() * factor).to(ctx.dtype), (dweight * factor).to(ctx.dtype)
        return dhidden, dweight, *(None,) * 5


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


@torch.library.register_fake("cogview_kernels::linear_cross_entropy")
def _forward_fake(hidden, weight, target, coefficient, summed, gradients, backend):
    loss = coefficient.new_empty(() if summed else coefficient.shape)
    if not (summed and gradients):
        return loss, hidden.new_empty(0), coefficient.new_empty(0)
    return loss, torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)
