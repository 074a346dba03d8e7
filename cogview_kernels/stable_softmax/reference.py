# SPDX-License-Identifier: Apache-2.0
"""PB-Relax softmax in eager PyTorch: any device, any floating dtype, differentiable by itself."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_softmax_reference(
    scores: Tensor,
    *,
    alpha: float = 1.0,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """See :func:`cogview_kernels.stable_softmax`; computed in the dtype of ``scores``."""
    visible = mask
    if causal:
        T, N = scores.shape[-2:]
        triangle = torch.ones(T, N, dtype=torch.bool, device=scores.device).tril()
        visible = triangle if mask is None else mask & triangle
    x = scores * scale
    if visible is not None:
        x = x.masked_fill(~visible, -torch.inf)
    if x.numel() == 0:
        return x
    row_max = x.amax(-1, keepdim=True)
    # A row without a key: subtracting -inf would give NaN where zeros are wanted.
    exponent = alpha * (x - row_max.masked_fill(row_max == -torch.inf, 0).detach())
    weights = exponent.exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(row_max == -torch.inf, 1)
