# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.layer_norm``: schemas, fake tensors, and what is saved.

Saved for the backward: the input, and each row's mean and reciprocal deviation in float32 (8 bytes a row).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cogview_kernels._norms.rows import Affine, NormOptions
from cogview_kernels._torch_ops import Op
from cogview_kernels.layer_norm import native


def backend_module(backend: str) -> ModuleType:
    """The module whose ``forward``, ``backward`` and ``limit`` serve ``backend``."""
    if backend == "triton":
        from cogview_kernels.layer_norm import triton_kernels

        return triton_kernels
    return native


def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.numel() // x.shape[-1]
    return y, torch.empty(2, rows, dtype=torch.float32, device=x.device)


def _forward(x: Tensor, *rest) -> tuple[Tensor, Tensor]:
    y, stats = _results(x)
    _fill(y, stats, x, *rest)
    return y, stats


def _without_stats(x, *rest):
    """As :func:`_forward`, an allocation less. Interpreted kernels save their statistics always."""
    if rest[-1] != "cpu":
        return _forward(x, *rest)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _fill(y, None, x, *rest)
    return y, None


def _fill(
    y: Tensor,
    stats: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pb_relax: str | None,
    backend: str,
) -> None:
    if y.numel() > 0:
        affine, options = Affine(weight, bias).contiguous(), NormOptions(eps, pb_relax)
        backend_module(backend).forward(x.contiguous(), y, affine, stats, options, backend)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    backend: str,
    needs_dweight: bool,
) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    gradients = Affine(weight if needs_dweight else None, bias).gradients()
    if x.numel() > 0:
        weight = Affine(weight, None).contiguous().weight
        module = backend_module(backend)
        module.backward(dy.contiguous(), x.contiguous(), dx, weight, gradients, stats, backend)
    else:
        gradients.fill_with_zeros()
    return dx, *gradients.outputs(stats)


def _backward_fake(dy, x, weight, bias, stats, backend, needs_dweight):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, *Affine(weight if needs_dweight else None, bias).gradients().outputs(stats)


def _save(ctx, arguments, outputs):
    x, weight, bias, _, _, ctx.backend = arguments
    return x, weight, bias, outputs[1]


def _differentiate(ctx, saved, dy, _):
    x, weight, bias, stats = saved
    # A bias is wanted only for the sake of its gradient.
    _, needs_dweight, needs_dbias, *_ = ctx.needs_input_grad
    dx, dweight, dbias = layer_norm_backward_op(
        dy, x, weight, bias if needs_dbias else None, stats, ctx.backend, needs_dweight
    )
    return dx, dweight if needs_dweight else None, dbias if needs_dbias else None, None, None, None


layer_norm_op = Op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, str? pb_relax, str backend)"
    " -> (Tensor, Tensor)",
    kernel=_forward,
    fake=lambda x, *_: _results(x),
    save=_save,
    backward=_differentiate,
    unsaved=_without_stats,
    prepare=native.prepare,
)
layer_norm_backward_op = Op(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, str backend,"
    " bool needs_dweight) -> (Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_backward_fake,
)
