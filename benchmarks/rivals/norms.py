# SPDX-License-Identifier: Apache-2.0
"""LayerNorm, RMSNorm and both sandwiches as eager PyTorch, torch.compile, Liger, quack and Apex do them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.definitions import FORWARD, Case, Forward, Inputs, Variant
from benchmarks.rivals import needs

EPS = 1e-5
RMS_EPS = 1e-6
PLAIN = "without PB-relax: overflows where PB-relax does not"

# Of rows, weight and, for LayerNorm, bias.
Norm = Callable[..., Tensor]


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

    wide = functools.cache(Tensor.float)  # it takes no others, and whoever uses it keeps them so
    return lambda x, weight, bias: layernorm(x, wide(weight), bias=wide(bias), eps=EPS)


def _apex_norm() -> Norm:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, x.shape[-1:], EPS)


def model_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As the models of Hugging Face's transformers write it; this is OLMo 2's."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + RMS_EPS)
    return (weight * wide).to(x.dtype)


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, RMS_EPS)


def _liger_rms_norm() -> Norm:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, RMS_EPS, 0.0, "gemma", False)


def _quack_rms_norm() -> Norm:
    from quack.rmsnorm import rmsnorm

    return lambda x, weight: rmsnorm(x, weight, eps=RMS_EPS)


def sandwich(norm: Norm, x: Inputs) -> tuple[Tensor, Tensor]:
    residual = x.residual + norm(x.branch, x.post_weight, x.post_bias)
    return residual, norm(residual, x.pre_weight, x.pre_bias)


def _single(norm: Norm, x: Inputs) -> Tensor:
    return norm(x.x, x.weight, x.bias)


def _rms_sandwich(norm: Norm, x: Inputs) -> tuple[Tensor, Tensor]:
    residual = x.residual + norm(x.branch, x.post_weight)
    return residual, norm(residual, x.pre_weight)


def _rms_single(norm: Norm, x: Inputs) -> Tensor:
    return norm(x.x, x.weight)


def _forward_only(case: Case, device: torch.device) -> str:
    if case.direction != FORWARD:
        return "quack's LayerNorm has no backward"
    return needs("quack", gpu=True)(case, device)


Chain = Callable[[Norm, Inputs], Any]
Prepare = Callable[[Inputs, Case], Forward]


def _eager(chain: Chain, norm: Norm) -> Prepare:
    return lambda x, case: lambda: chain(norm, x)


def _library(chain: Chain, load: Callable[[], Norm]) -> Prepare:
    def prepare(x: Inputs, case: Case) -> Forward:
        norm = load()
        return lambda: chain(norm, x)

    return prepare


def _compiled(chain: Chain, norm: Norm) -> Prepare:
    def prepare(x: Inputs, case: Case) -> Forward:
        # Inputs as arguments, not as attributes that Dynamo would guard one by one.
        names = tuple(x.values)

        def function(*tensors: Tensor) -> Any:
            return chain(norm, Inputs(dict(zip(names, tensors, strict=True))))

        fast = torch.compile(function, dynamic=False)
        return lambda: fast(*x.values.values())

    return prepare


def _variants(chain: Chain) -> tuple[Variant, ...]:
    """The same rivals for one LayerNorm and for the sandwich."""
    liger, apex = needs("liger_kernel", gpu=True), needs("apex", gpu=True)
    return (
        Variant("eager PB-relax", _eager(chain, pb_relax_norm)),
        Variant("torch.compile PB-relax", _compiled(chain, pb_relax_norm)),
        Variant("eager F.layer_norm", _eager(chain, plain_norm), note=PLAIN),
        Variant("torch.compile F.layer_norm", _compiled(chain, plain_norm), note=PLAIN),
        Variant("Liger LayerNorm", _library(chain, _liger_norm), why_not=liger, note=PLAIN),
        Variant("quack LayerNorm", _library(chain, _quack_norm), why_not=_forward_only, note=PLAIN),
        Variant("Apex LayerNorm", _library(chain, _apex_norm), why_not=apex, note=PLAIN),
    )


def _rms_variants(chain: Chain) -> tuple[Variant, ...]:
    """The same rivals for one RMSNorm and for the sandwich."""
    liger, quack = needs("liger_kernel", gpu=True), needs("quack", gpu=True)
    return (
        Variant("eager", _eager(chain, model_rms_norm)),
        Variant("torch.compile", _compiled(chain, model_rms_norm)),
        Variant("eager F.rms_norm", _eager(chain, plain_rms_norm)),
        Variant("Liger RMSNorm", _library(chain, _liger_rms_norm), why_not=liger),
        Variant("quack RMSNorm", _library(chain, _quack_rms_norm), why_not=quack),
    )


SINGLE, SANDWICH = _variants(_single), _variants(sandwich)
RMS_SINGLE, RMS_SANDWICH = _rms_variants(_rms_single), _rms_variants(_rms_sandwich)
