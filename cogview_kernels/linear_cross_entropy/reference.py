# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a linear layer in eager PyTorch, logits and all: any device, any floating dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    vocab_range: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(loss, losses)``, see :func:`cogview_kernels.linear_cross_entropy`; in the dtype of ``hidden``."""
    start, stop = vocab_range or (0, weight.shape[0])
    counted = target != ignore_index
    coefficient = counted.to(hidden.dtype)
    if token_weight is not None:
        coefficient = torch.where(counted, token_weight.detach().to(hidden.dtype), 0)
    # Tokens that do not count are cut off before the logarithm: 0 times infinity would be NaN.
    counted = coefficient != 0
    logits = F.linear(hidden, weight[start:stop]).masked_fill(~counted[..., None], 0)
    known = (target >= start) & (target < stop)
    index = torch.where(known, target - start, 0)[..., None]
    losses = -logits.log_softmax(-1).gather(-1, index).squeeze(-1)
    # The softmax gives nothing to an id outside the range.
    losses = losses.masked_fill(counted & ~known, torch.inf)
    weighted = coefficient * losses
    if reduction == "none":
        loss = weighted
    else:
        loss = weighted.sum() if reduction == "sum" else weighted.sum() / coefficient.sum()
    return loss, losses.detach().masked_fill(~counted, 0)
