# SPDX-License-Identifier: Apache-2.0
"""Sandwich-LayerNorm in eager PyTorch: any device, any floating dtype, differentiable by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_kernels import _random
from cogview_kernels._pb_relax import pb_relax as relax


def _dropout(x: Tensor, p: float, seed: int | Tensor | None) -> Tensor:
    """Row r of ``x`` taken as ``[rows, C]`` draws from the counter (r mod 2^32, r div 2^32, 0)."""
    if p == 0:
        return x
    C = x.shape[-1]
    rows = torch.arange(x.numel() // C, device=x.device)
    key = _random.as_seed(seed).to(x.device)
    words = _random.philox(key, rows & 0xFFFFFFFF, rows >> 32, torch.zeros_like(rows))
    columns = torch.arange(C, device=x.device)
    keep = _random.keep_mask(p, (words[0][:, None], words[1][:, None]), columns)
    return torch.where(keep.view(x.shape), x / (1 - p), 0)


def sandwich_layer_norm_reference(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    pb_relax: str | None = "row",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`cogview_kernels.sandwich_layer_norm`; computed in the dtype of ``branch``."""

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        weight = None if weight is None else weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return F.layer_norm(relax(x, pb_relax), x.shape[-1:], weight, bias, eps)

    residual_out = residual + norm(_dropout(branch, dropout_p, seed), post_weight, post_bias)
    return residual_out, norm(residual_out, pre_weight, pre_bias)
