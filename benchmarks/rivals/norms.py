# SPDX-License-Identifier: Apache-2.0
"""LayerNorm and Sandwich-LayerNorm as eager PyTorch, torch.compile, Liger, quack and Apex do them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.definitions import FORWARD, Case, Forward, Inputs, Variant
from benchmarks.rivals import needs

EPS = 1e-5
PLAIN = "without PB-relax: overflows where PB-relax does not"

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def pb_relax_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As CogView writes it, with the row's maximum."""
    relaxed = x / (x.detach().abs().amax(-1, keepdim=True) / 8)
    return F.layer_norm(relaxed, x.shape[-1:], weight, bias, EPS)


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _liger_norm() -> Norm:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)


def _quack_norm() -> Norm:
    from quack.layernorm import layernorm

    return lambda x, weight, bias: layernorm(x, weight.float(), bias=bias.float(), eps=EPS)


def _apex_norm() -> Norm:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, x.shape[-1:], EPS)


def sandwich(norm: Norm, x: Inputs) -> tuple[Tensor, Tensor]:
    residual = x.residual + norm(x.branch, x.post_weight, x.post_bias)
    return residual, norm(residual, x.pre_weight, x.pre_bias)


def _single(norm: Norm, x: Inputs) -> Tensor:
    return norm(x.x, x.weight, x.bias)


def _forward_only(case: Case, device: torch.device) -> str:
    if case.direction != FORWARD:
        return "quack's LayerNorm has no backward"
    return needs("quack", gpu=True)(case, device)


def variants(chain: Callable[[Norm, Inputs], Any]) -> tuple[Variant, ...]:
    """The same rivals for one norm (``SINGLE``) and for the sandwich (``SANDWICH``)."""

    def eager(norm: Norm) -> Callable[[Inputs, Case], Forward]:
        return lambda x, case: lambda: chain(norm, x)

    def library(load: Callable[[], Norm]) -> Callable[[Inputs, Case], Forward]:
        def prepare(x: Inputs, case: Case) -> Forward:
            norm = load()
            return lambda: chain(norm, x)

        return prepare

    def compiled(x: Inputs, case: Case) -> Forward:
        # Inputs as arguments, not as attributes that Dynamo would guard one by one.
        names = tuple(x.values)

        def function(*tensors: Tensor) -> Any:
            return chain(pb_relax_norm, Inputs(dict(zip(names, tensors, strict=True))))

        fast = torch.compile(function, dynamic=False)
        return lambda: fast(*x.values.values())

    return (
        Variant("eager PB-relax", eager(pb_relax_norm)),
        Variant("torch.compile PB-relax", compiled),
        Variant("eager F.layer_norm", eager(plain_norm), note=PLAIN),
        Variant("Liger LayerNorm", library(_liger_norm), why_not=needs("liger_kernel", gpu=True), note=PLAIN),
        Variant("quack LayerNorm", library(_quack_norm), why_not=_forward_only, note=PLAIN),
        Variant("Apex LayerNorm", library(_apex_norm), why_not=needs("apex", gpu=True), note=PLAIN),
    )


SINGLE = variants(_single)
SANDWICH = variants(sandwich)
