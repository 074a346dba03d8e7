# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.linear_cross_entropy``: schemas, fake tensors, and what is saved.

Where the losses are summed, the gradients are made during the forward pass, up to the one factor that the
backward pass brings, and no logits are kept. Where each loss is returned, its factor is known in the backward
pass only, and the logits are made again there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels._torch_ops import Op, is_transformed
from cogview_kernels.linear_cross_entropy import chunked, native
from cogview_kernels.linear_cross_entropy.pieces import Options, Steps, linear_cross_entropy_in_pieces


def backend_module(backend: str) -> Steps:
    """The module whose steps serve ``backend``."""
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
    extra_memory: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(loss, losses, dhidden, dweight, scales)``; ``losses`` are not multiplied by ``coefficient``."""
    made, unit = summed and gradients, None
    if made and hidden.dtype == torch.float16:
        coefficient, unit = _to_unit(coefficient)
    losses, dhidden, dweight, scales = linear_cross_entropy_in_pieces(
        hidden,
        weight,
        target.contiguous(),
        coefficient.contiguous(),
        (start, stop),
        Options(made, backend_module(backend), extra_memory),
    )
    loss = coefficient * losses
    if summed:
        loss = loss.sum()
    if unit is not None:
        loss, scales = loss * unit, scales / unit
    return loss, losses, dhidden, dweight, scales


def _to_unit(coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """``coefficient`` divided by its largest, and that: float16 has no room for large or small ones."""
    if coefficient.numel() == 0:
        return coefficient, coefficient.sum()
    unit = coefficient.abs().amax()
    return coefficient / torch.where(unit == 0, 1, unit), unit


def _fake(hidden, weight, target, coefficient, start, stop, summed, gradients, extra_memory, backend):
    losses, scales = coefficient.new_empty(coefficient.shape), coefficient.new_empty(2)
    loss = coefficient.new_empty(()) if summed else torch.empty_like(losses)
    if not (summed and gradients):
        return loss, losses, hidden.new_empty(0), hidden.new_empty(0), scales
    return loss, losses, hidden.new_empty(hidden.shape), hidden.new_empty(weight.shape), scales


def _save(ctx, arguments, outputs):
    *tensors, start, stop, summed, gradients, ctx.extra_memory, ctx.backend = arguments
    ctx.vocab_range, ctx.summed, ctx.made = (start, stop), summed, summed and gradients
    return outputs[2:] if ctx.made else tensors


def _backward(
    dloss: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    target: Tensor | None,
    coefficient: Tensor | None,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    scales: Tensor | None,
    start: int,
    stop: int,
    extra_memory: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``(dhidden, dweight)`` from those that the forward pass made, or else from its arguments."""
    if dhidden is not None and dweight is not None and scales is not None:
        factors = dloss / scales
        return (dhidden * factors[:1]).to(dhidden.dtype), (dweight * factors[1:]).to(dweight.dtype)
    assert hidden is not None and weight is not None and target is not None and coefficient is not None
    # A product would not do: a loss divided by the number of tokens, none, brings an infinite dloss.
    coefficient, factor = _to_unit(torch.where(coefficient != 0, coefficient * dloss, 0))
    _, _, dhidden, dweight, scales = _forward(
        hidden, weight, target, coefficient, start, stop, True, True, extra_memory, backend
    )
    _scale(dhidden, dweight, factor / scales, backend)
    return dhidden, dweight


def _scale(dhidden: Tensor, dweight: Tensor, factors: Tensor, backend: str) -> None:
    """In place."""
    scale = backend_module(backend).scale
    scale(dhidden, factors[0])
    scale(dweight, factors[1])


def _backward_fake(dloss, hidden, weight, target, coefficient, dhidden, dweight, *_):
    if dhidden is not None:
        return torch.empty_like(dhidden), torch.empty_like(dweight)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _may_overwrite(gradient: Tensor) -> bool:
    """Whether this is the last backward pass, and one that nobody traces or differentiates."""
    return (
        type(gradient) is Tensor
        and not torch.is_grad_enabled()
        and not is_transformed()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )


def _differentiate(ctx, saved, dloss, *_):
    if ctx.made and _may_overwrite(saved[0]):
        dhidden, dweight, scales = saved
        _scale(dhidden, dweight, dloss / scales, ctx.backend)
    else:
        known = (*(None,) * 4, *saved) if ctx.made else (*saved, *(None,) * 3)
        dhidden, dweight = linear_cross_entropy_backward_op(
            dloss, *known, *ctx.vocab_range, ctx.extra_memory, ctx.backend
        )
    return dhidden, dweight, *(None,) * 8


def _one_product(hidden: Tensor, start: int, stop: int) -> int:
    return 2 * hidden.shape[0] * (stop - start) * hidden.shape[1]


def _forward_flops(of, _):
    products = 3 if of["summed"] and of["gradients"] else 1
    return products * _one_product(of["hidden"], of["start"], of["stop"])


def _backward_flops(of, _):
    """Nothing where the forward pass made the gradients."""
    return 0 if of["hidden"] is None else 3 * _one_product(of["hidden"], of["start"], of["stop"])


linear_cross_entropy_op = Op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor coefficient,"
    " int start, int stop, bool summed, bool gradients, float extra_memory, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_forward,
    fake=_fake,
    save=_save,
    backward=_differentiate,
    flops=_forward_flops,
)
linear_cross_entropy_backward_op = Op(
    "linear_cross_entropy_backward(Tensor dloss, Tensor? hidden, Tensor? weight, Tensor? target,"
    " Tensor? coefficient, Tensor? dhidden, Tensor? dweight, Tensor? scales, int start, int stop,"
    " float extra_memory, str backend) -> (Tensor, Tensor)",
    kernel=_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
