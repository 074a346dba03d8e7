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

from cogview_kernels import _extension, _library
from cogview_kernels.linear_cross_entropy import chunked
from cogview_kernels.linear_cross_entropy.chunked import Steps

_library.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor coefficient, "
    "int start, int stop, bool summed, bool gradients, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _reduce_cpu(logits: Tensor, target: Tensor, stats: Tensor) -> None:
    V, n = logits.shape
    peak, total, picked = stats
    picked.copy_(chunked.picked_logits(logits, target))
    _extension.native.linear_cross_entropy_reduce_cpu(
        logits.data_ptr(),
        logits.stride(0),
        V,
        n,
        peak.data_ptr(),
        total.data_ptr(),
        _extension.DTYPE_CODES[logits.dtype],
        torch.get_num_threads(),
    )


def _gradient_cpu(logits: Tensor, first: int, target: Tensor, coefficient: Tensor, stats: Tensor) -> None:
    v, n = logits.shape
    _extension.native.linear_cross_entropy_gradient_cpu(
        logits.data_ptr(),
        logits.stride(0),
        v,
        n,
        first,
        target.data_ptr(),
        coefficient.data_ptr(),
        stats[0].data_ptr(),
        stats[1].data_ptr(),
        _extension.DTYPE_CODES[logits.dtype],
        torch.get_num_threads(),
    )


def _steps(backend: str) -> Steps:
    if backend == "cpu":
        return Steps(_reduce_cpu, _gradient_cpu)
    if backend == "triton":
        from cogview_kernels.linear_cross_entropy import triton_kernels

        return Steps(*triton_kernels.steps())
    return chunked.EAGER_STEPS


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, dhidden, dweight, scales = chunked.linear_cross_entropy_chunked(
        hidden,
        weight,
        target.contiguous(),
        coefficient.contiguous(),
        (start, stop),
        summed and gradients,
        _steps(backend),
    )
    return losses.sum() if summed else losses, dhidden, dweight, scales


def _to_unit(coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """``coefficient`` divided by its largest, and that: float16 has no room for large or small ones."""
    if coefficient.numel() == 0:
        return coefficient, coefficient.sum()
    unit = coefficient.abs().amax()
    return coefficient / torch.where(unit == 0, 1, unit), unit


def _scale_(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """``gradient *= factor``, multiplied in float32 and rounded once, without a copy in float32."""
    if backend == "triton":
        from cogview_kernels.linear_cross_entropy.triton_kernels import launch_scale

        launch_scale(gradient, factor)
        return
    rows = len(gradient)
    if gradient.device.type == "cpu":
        if factor == 1:
            return
        # PyTorch widens a whole operand here: a few rows at a time.
        rows = chunked.CHUNK_ELEMENTS // (2 * gradient.shape[1])
    for part in gradient.split(max(1, rows)):
        # One dimension, as a factor of none would first be rounded to the dtype of the gradient.
        torch.mul(part, factor.view(1), out=part)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, coefficient, start, stop, summed, gradients, backend):
        unit = None
        if summed and gradients and hidden.dtype == torch.float16:
            coefficient, unit = _to_unit(coefficient)
        loss, dhidden, dweight, scales = _library.eager(
            "linear_cross_entropy",
            *(hidden, weight, target, coefficient, start, stop, summed, gradients, backend),
        )
        if unit is not None:
            loss, scales = loss * unit, scales / unit
        saved = (dhidden, dweight, scales) if summed else (hidden, weight, target, coefficient)
        ctx.save_for_backward(*saved)
        ctx.vocab_range, ctx.summed, ctx.backend = (start, stop), summed, backend
        ctx.mark_non_differentiable(dhidden, dweight, scales)
        ctx.set_materialize_grads(False)
        return loss, dhidden, dweight, scales

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 9
        if ctx.summed:
            (dhidden, dweight, scales), factor = ctx.saved_tensors, dloss
        else:
            hidden, weight, target, coefficient = ctx.saved_tensors
            coefficient, factor = _to_unit(coefficient * dloss)
            _, dhidden, dweight, scales = _library.eager(
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
            _scale_(dhidden, factors[0], ctx.backend)
            _scale_(dweight, factors[1], ctx.backend)
        return dhidden, dweight, *(None,) * 7


def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    vocab_range: tuple[int, int],
    summed: bool,
    backend: str,
) -> Tensor:
    """By the shortest way to the kernel that differentiates where it must and can be traced."""
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    arguments = (hidden, weight, target, coefficient, *vocab_range, summed, gradients, backend)
    if torch.compiler.is_compiling():
        return torch.ops.cogview_kernels.linear_cross_entropy(*arguments)[0]
    if gradients:
        return LinearCrossEntropy.apply(*arguments)[0]
    return _library.eager("linear_cross_entropy", *arguments)[0]


_library.implement("linear_cross_entropy", _forward, LinearCrossEntropy)


@torch.library.register_fake("cogview_kernels::linear_cross_entropy")
def _forward_fake(hidden, weight, target, coefficient, start, stop, summed, gradients, backend):
    loss = coefficient.new_empty(() if summed else coefficient.shape)
    scales = coefficient.new_empty(2)
    if not (summed and gradients):
        return loss, hidden.new_empty(0), hidden.new_empty(0), scales
    return loss, hidden.new_empty(hidden.shape), hidden.new_empty(weight.shape), scales
