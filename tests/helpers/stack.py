# SPDX-License-Identifier: Apache-2.0
"""Weights of a stack of layers in which every term is large enough to matter."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import LayerStack, LayerWeights


def random_stack(
    layers: int = 2,
    C: int = 64,
    F: int = 100,
    *,
    dtype: torch.dtype = torch.float32,
    pb_relax: str | None = "row",
) -> LayerStack:
    def norm() -> tuple[Tensor, Tensor]:
        return (1 + 0.3 * torch.randn(C)).to(dtype), (0.3 * torch.randn(C)).to(dtype)

    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        weight = 1.5 * torch.randn(outputs, inputs) / inputs**0.5
        return weight.to(dtype), (0.5 * torch.randn(outputs)).to(dtype)

    def layer() -> LayerWeights:
        attention = norm(), linear(3 * C, C), linear(C, C), norm()
        return LayerWeights(*attention, norm(), linear(F, C), linear(C, F), norm())

    return LayerStack(tuple(layer() for _ in range(layers)), norm(), pb_relax=pb_relax)
