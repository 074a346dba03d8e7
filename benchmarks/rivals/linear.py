# SPDX-License-Identifier: Apache-2.0
"""A linear layer of few rows and its GELU in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.definitions import Case, Forward, Inputs, Variant

PLAIN = "F.linear and F.gelu"
ADDMM = "addmm, fused GELU"


def _plain(x: Inputs, case: Case) -> Forward:
    def linear(weight: torch.Tensor) -> torch.Tensor:
        y = F.linear(x.x, weight, x.bias)
        return y if x.activation is None else F.gelu(y, approximate="tanh")

    return lambda: tuple(map(linear, x.weights))


def _addmm(x: Inputs, case: Case) -> Forward:
    """On a GPU, cuBLASLt adds the bias and applies the GELU as it stores the product."""

    def linear(weight: torch.Tensor) -> torch.Tensor:
        if x.activation is None:
            return torch.addmm(x.bias, x.x, weight.t())
        return torch._addmm_activation(x.bias, x.x, weight.t(), use_gelu=True)

    return lambda: tuple(map(linear, x.weights))


def _not_on_a_gpu(case: Case, device: torch.device) -> str:
    return "" if device.type == "cuda" else "on a CPU its GELU is the exact one"


VARIANTS = (Variant(PLAIN, _plain), Variant(ADDMM, _addmm, why_not=_not_on_a_gpu))
