# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.rms_norm``: schemas, fake tensors, and what is saved.

Saved for the backward: the input, and each row's reciprocal root mean square in float32 (4 bytes a row).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cogview_kernels._norms.rows import Affine, NormOptions
from cogview_kernels._torch_ops import Op
from cogview_kernels.rms_norm import native


def backend_module(backend: str) -> ModuleType:
    """The module whose ``forward``, ``backward`` and ``limit`` serve ``backend``."""
    if backend == "triton":
        from cogview_kernels.rms_norm import triton_kernels

        return triton_kernels
    return native


def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.numel() // x.shape[-1]
    return y, torch.empty(1, rows, dtype=torch.float32, device=x.device)


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
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    pb_relax: str | None,
    backend: str,
) -> None:
    if y.numel() > 0:
        affine = Affine(weight, None).contiguous()
        options = NormOptions(eps, pb_relax, weight_offset, round_before_weight)
        backend_module(backend).forward(x.contiguous(), y, affine, stats, options, backend)


def _gradients(x: Tensor, weight: Tensor | None, needs_dweight: bool) -> tuple[Tensor, Affine]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, Affine(weight if needs_dweight else None, None).gradients()


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    weight_offset: float,
    backend: str,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dx, gradients = _gradients(x, weight, needs_dweight)
    if x.numel() > 0:
        rows = dy.contiguous(), x.contiguous(), dx
        weight = None if weight is None else weight.contiguous()
        backend_module(backend).backward(*rows, weight, gradients, stats, weight_offset, backend)
    else:
        gradients.fill_with_zeros()
    return dx, gradients.outputs(stats)[0]


def _backward_fake(dy, x, weight, stats, weight_offset, backend, needs_dweight):
    dx, gradients = _gradients(x, weight, needs_dweight)
    return dx, gradients.outputs(stats)[0]


def _save(ctx, arguments, outputs):
    x, weight, _, ctx.weight_offset, _, _, ctx.backend = arguments
    return x, weight, outputs[1]


def _differentiate(ctx, saved, dy, _):
    x, weight, stats = saved
    needs_dweight = ctx.needs_input_grad[1]
    dx, dweight = rms_norm_backward_op(dy, x, weight, stats, ctx.weight_offset, ctx.backend, needs_dweight)
    return dx, dweight if needs_dweight else None, None, None, None, None, None


rms_norm_op = Op(
    "rms_norm(Tensor x, Tensor? weight, float eps, float weight_offset, bool round_before_weight,"
    " str? pb_relax, str backend) -> (Tensor, Tensor)",
    kernel=_forward,
    fake=lambda x, *_: _results(x),
    save=_save,
    backward=_differentiate,
    unsaved=_without_stats,
    prepare=native.prepare,
)
rms_norm_backward_op = Op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor stats, float weight_offset, str backend,"
    " bool needs_dweight) -> (Tensor, Tensor)",
    kernel=_backward,
    fake=_backward_fake,
)
