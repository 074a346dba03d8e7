# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.linear_cross_entropy``: schemas, fake tensors, and what is saved.

Where the losses are summed, the gradients are made during the forward pass, up to the one factor that the
backward pass brings, and no logits are kept. Where each loss is returned, its factor is known in the backward
pass only, and the logits are made again there. Of what is frozen no gradient is made, and an empty tensor
stands in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels._torch_ops import Op, is_transformed
from cogview_kernels.linear_cross_entropy import chunked, native
from cogview_kernels.linear_cross_entropy.objective import Objective
from cogview_kernels.linear_cross_entropy.pieces import (
    Options,
    Steps,
    Wanted,
    linear_cross_entropy_in_pieces,
)


def backend_module(backend: str) -> Steps:
    """The module whose steps serve ``backend``."""
    if backend == "triton":
        from cogview_kernels.linear_cross_entropy import triton_kernels

        return triton_kernels
    return native if backend == "cpu" else chunked


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    coefficient: Tensor,
    start: int,
    stop: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    summed: bool,
    dhidden: bool,
    dweight: bool,
    dbias: bool,
    predict: bool,
    extra_memory: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """``(loss, losses, predicted, dhidden, dweight, dbias, scales)``; ``losses`` are not multiplied by
    ``coefficient``. ``dhidden``, ``dweight`` and ``dbias`` say which gradients are wanted."""
    wanted = Wanted(summed and dhidden, summed and dweight, summed and dbias, predict)
    unit = None
    if wanted.gradients and hidden.dtype == torch.float16:
        coefficient, unit = _to_unit(coefficient)
    losses, predicted, *gradients, scales = linear_cross_entropy_in_pieces(
        hidden,
        weight,
        bias,
        target.contiguous(),
        coefficient.contiguous(),
        (start, stop),
        Options(wanted, backend_module(backend), Objective(label_smoothing, softcap, z_loss), extra_memory),
    )
    loss = coefficient * losses
    if summed:
        loss = loss.sum()
    scales = torch.cat((scales, scales.new_ones(1)))
    if unit is not None:
        loss, scales = loss * unit, scales / unit
    return loss, losses, predicted, *gradients, scales


def _to_unit(coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """``coefficient`` divided by its largest, and that: float16 has no room for large or small ones."""
    if coefficient.numel() == 0:
        return coefficient, coefficient.sum()
    unit = coefficient.abs().amax()
    return coefficient / torch.where(unit == 0, 1, unit), unit


def _fake(hidden, weight, bias, target, coefficient, *numbers):
    *_, summed, dhidden, dweight, dbias, predict, _, _ = numbers
    losses = coefficient.new_empty(coefficient.shape)
    return (
        coefficient.new_empty(()) if summed else torch.empty_like(losses),
        losses,
        target.new_empty(target.shape if predict else 0),
        hidden.new_empty(hidden.shape if summed and dhidden else 0),
        hidden.new_empty(weight.shape if summed and dweight else 0),
        coefficient.new_empty(len(weight) if summed and dbias else 0),
        coefficient.new_empty(3),
    )


def _save(ctx, arguments, outputs):
    tensors, numbers = arguments[:5], arguments[5:]
    *ctx.objective, ctx.summed = numbers[:6]
    ctx.wanted, (ctx.extra_memory, ctx.backend) = numbers[6:9], numbers[10:]
    ctx.made = ctx.summed and any(ctx.wanted)
    return outputs[3:] if ctx.made else tensors


def _backward(
    dloss: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor | None,
    coefficient: Tensor | None,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    scales: Tensor | None,
    start: int,
    stop: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    extra_memory: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dhidden, dweight, dbias)`` from those that the forward pass made, or else from its arguments."""
    if dhidden is not None and dweight is not None and dbias is not None and scales is not None:
        factors = (dloss / scales).split(1)
        dhidden, dweight = (dhidden * factors[0]).to(dhidden.dtype), (dweight * factors[1]).to(dweight.dtype)
        return dhidden, dweight, (dbias * factors[2]).to(dhidden.dtype)
    assert hidden is not None and weight is not None and target is not None and coefficient is not None
    # A product would not do: a loss divided by the number of tokens, none, brings an infinite dloss.
    coefficient, factor = _to_unit(torch.where(coefficient != 0, coefficient * dloss, 0))
    numbers = (start, stop, label_smoothing, softcap, z_loss)
    wanted = (want_hidden, want_weight, want_bias)
    *made, scales = _forward(
        hidden, weight, bias, target, coefficient, *numbers, True, *wanted, False, extra_memory, backend
    )[3:]
    return _scaled(made, factor / scales, backend)


def _scaled(made: list[Tensor], factors: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients multiplied by their factors, ``dhidden`` and ``dweight`` in place."""
    dhidden, dweight, dbias = made
    scale = backend_module(backend).scale
    for gradient, factor in ((dhidden, factors[0]), (dweight, factors[1])):
        if gradient.numel():
            scale(gradient, factor)
    return dhidden, dweight, (dbias * factors[2]).to(dhidden.dtype)


def _backward_fake(
    dloss, hidden, weight, bias, target, coefficient, dhidden, dweight, dbias, scales, *numbers
):
    if dhidden is not None:
        return torch.empty_like(dhidden), torch.empty_like(dweight), dhidden.new_empty(dbias.shape)
    want_hidden, want_weight, want_bias = numbers[5:8]
    return (
        hidden.new_empty(hidden.shape if want_hidden else 0),
        hidden.new_empty(weight.shape if want_weight else 0),
        hidden.new_empty(len(weight) if want_bias else 0),
    )


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
        *made, scales = saved
        gradients = _scaled(made, dloss / scales, ctx.backend)
    else:
        known = (*(None,) * 5, *saved) if ctx.made else (*saved, *(None,) * 4)
        gradients = linear_cross_entropy_backward_op(
            dloss, *known, *ctx.objective, *ctx.wanted, ctx.extra_memory, ctx.backend
        )
    asked_for = (x if wanted else None for x, wanted in zip(gradients, ctx.wanted, strict=True))
    return *asked_for, *(None,) * 14


def _one_product(hidden: Tensor, start: int, stop: int) -> int:
    return 2 * hidden.shape[0] * (stop - start) * hidden.shape[1]


def _forward_flops(of, _):
    gradients = of["dhidden"] + of["dweight"] if of["summed"] else 0
    return (1 + gradients) * _one_product(of["hidden"], of["start"], of["stop"])


def _backward_flops(of, _):
    """Nothing where the forward pass made the gradients."""
    if of["hidden"] is None:
        return 0
    products = 1 + of["want_hidden"] + of["want_weight"]
    return products * _one_product(of["hidden"], of["start"], of["stop"])


_OBJECTIVE = "int start, int stop, float label_smoothing, float softcap, float z_loss"

linear_cross_entropy_op = Op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor coefficient,"
    f" {_OBJECTIVE}, bool summed, bool dhidden, bool dweight, bool dbias, bool predict,"
    " float extra_memory, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_forward,
    fake=_fake,
    save=_save,
    backward=_differentiate,
    flops=_forward_flops,
)
linear_cross_entropy_backward_op = Op(
    "linear_cross_entropy_backward(Tensor dloss, Tensor? hidden, Tensor? weight, Tensor? bias,"
    " Tensor? target, Tensor? coefficient, Tensor? dhidden, Tensor? dweight, Tensor? dbias, Tensor? scales,"
    f" {_OBJECTIVE}, bool want_hidden, bool want_weight, bool want_bias,"
    " float extra_memory, str backend) -> (Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
