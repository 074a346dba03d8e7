# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.decode_linear``: schema and fake tensor. The op has no derivative."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from cogview_kernels._attention import with_rows
from cogview_kernels._torch_ops import Op
from cogview_kernels.decode_linear import native


def backend_module(backend: str) -> ModuleType:
    """The module whose ``forward`` and ``limit`` serve ``backend``."""
    if backend == "triton":
        from cogview_kernels.decode_linear import triton_kernels

        return triton_kernels
    return native


def _empty_output(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str) -> Tensor:
    y = _empty_output(x, weight)
    if y.numel() > 0:
        bias = None if bias is None else bias.contiguous()
        backend_module(backend).forward(x.contiguous(), with_rows(weight), bias, activation, y, backend)
    return y


decode_linear_op = Op(
    "decode_linear(Tensor x, Tensor weight, Tensor? bias, str? activation, str backend) -> Tensor",
    kernel=_forward,
    fake=_empty_output,
    flops=lambda of, _: 2 * of["x"].numel() * of["weight"].shape[0],
)
