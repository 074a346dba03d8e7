# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.linear_cross_entropy``: registration, fake tensors, and what is saved.

Where the losses are summed, the gradients are made during the forward pass, up to the one factor that the
backward pass brings, and no logits are kept. Where each loss is returned, its factor is known in the backward
pass only, and the logits are made again there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogview_kernels import _library
from cogview_kernels.linear_cross_entropy import chunked, native, pieces
from cogview_kernels.linear_cross_entropy.pieces import Steps

_library.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor coefficient, "
    "int start, int stop, bool summed, bool gradients, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def steps(backend: str) -> Steps:
    if backend == "triton":
        from cogview_kernels.linear_cross_entropy import triton_kernels

        return triton_kernels
    return native if backend == "cpu" else chunked


def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    start: int,
    stop: int,
    summed: bool,
    gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(loss, losses, dhidden, dweight, scales)``; ``losses`` are not multiplied by ``coefficient``."""
    losses, dhidden, dweight, scales = pieces.linear_cross_entropy_in_pieces(
        hidden,
        weight,
        target.contiguous(),
        coefficient.contiguous(),
        (start, stop),
        summed and gradients,
        steps(backend),
    )
    weighted = coefficient * losses
    return weighted.sum() if summed else weighted, losses, dhidden, dweight, scales


def _to_unit(coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """``coefficient`` divided by its largest, and that: float16 has no room for large or small ones."""
    if coefficient.numel() == 0:
        return coefficient, coefficient.sum()
    unit = coefficient.abs().amax()
    return coefficient / torch.where(unit == 0, 1, unit), unit


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, coefficient, start, stop, summed, gradients, backend):
        unit = None
        if summed and gradients and hidden.dtype == torch.float16:
            coefficient, unit = _to_unit(coefficient)
        loss, losses, dhidden, dweight, scales = _library.eager(
            "linear_cross_entropy",
            *(hidden, weight, target, coefficient, start, stop, summed, gradients, backend),
        )
        if unit is not None:
            loss, scales = loss * unit, scales / unit
        saved = (dhidden, dweight, scales) if summed else (hidden, weight, target, coefficient)
        ctx.save_for_backward(*saved)
        ctx.vocab_range, ctx.summed, ctx.backend = (start, stop), summed, backend
        ctx.mark_non_differentiable(losses, dhidden, dweight, scales)
        ctx.set_materialize_grads(False)
        return loss, losses, dhidden, dweight, scales

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 9
        if ctx.summed:
            (dhidden, dweight, scales), factor = ctx.saved_tensors, dloss
        else:
            hidden, weight, target, coefficient = ctx.saved_tensors
            # Not a product alone: a loss divided by the number of tokens, none, brings an infinite dloss.
            coefficient, factor = _to_unit(torch.where(coefficient != 0, coefficient * dloss, 0))
            _, _, dhidden, dweight, scales = _library.eager(
                "linear_cross_entropy",
                *(hidden, weight, target, coefficient, *ctx.vocab_range, True, True, ctx.backend),
            )
        factors = factor / scales
        # What was saved is overwritten, unless another backward pass is to come or this one is being traced.
        again = ctx.summed and torch._C._autograd._get_current_graph_task_keep_graph()
        if type(dhidden) is not Tensor or again:
            dhidden = (dhidden * factors[:1]).to(dhidden.dtype)
            dweight = (dweight * factors[1:]).to(dweight.dtype)
        else:
            scale = steps(ctx.backend).scale
            scale(dhidden, factors[0])
            scale(dweight, factors[1])
        return dhidden, dweight, *(None,) * 7


def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    vocab_range: tuple[int, int],
    summed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``(loss, losses)``, by the shortest way to the kernel that differentiates where it must."""
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    arguments = (hidden, weight, target, coefficient, *vocab_range, summed, gradients, backend)
    if torch.compiler.is_compiling():
        return torch.ops.cogview_kernels.linear_cross_entropy(*arguments)[:2]
    if gradients:
        return LinearCrossEntropy.apply(*arguments)[:2]
    return _library.eager("linear_cross_entropy", *arguments)[:2]


_library.implement("linear_cross_entropy", _forward, LinearCrossEntropy)


@torch.library.register_fake("cogview_kernels::linear_cross_entropy")
def _forward_fake(hidden, weight, target, coefficient, start, stop, summed, gradients, backend):
    losses, scales = coefficient.new_empty(coefficient.shape), coefficient.new_empty(2)
    loss = coefficient.new_empty(()) if summed else torch.empty_like(losses)
    if not (summed and gradients):
        return loss, losses, hidden.new_empty(0), hidden.new_empty(0), scales
    return loss, losses, hidden.new_empty(hidden.shape), hidden.new_empty(weight.shape), scales
