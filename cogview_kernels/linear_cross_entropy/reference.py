# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a linear layer in eager PyTorch, logits and all: any device, any floating dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_kernels.linear_cross_entropy.objective import PLAIN, Objective


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    objective: Objective = PLAIN,
    vocab_range: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, losses, predicted)``, see :func:`cogview_kernels.linear_cross_entropy`; in the dtype of
    ``hidden``."""
    start, stop = vocab_range or (0, weight.shape[0])
    counted = target != ignore_index
    coefficient = counted.to(hidden.dtype)
    if token_weight is not None:
        coefficient = torch.where(counted, token_weight.detach().to(hidden.dtype), 0)
    # Tokens that do not count are cut off before the logarithm: 0 times infinity would be NaN.
    counted = coefficient != 0
    logits = F.linear(hidden, weight[start:stop], None if bias is None else bias[start:stop])
    logits = logits.masked_fill(~counted[..., None], 0)
    if objective.softcap:
        logits = objective.softcap * (logits / objective.softcap).tanh()
    known = (target >= start) & (target < stop)
    losses = _losses(logits, torch.where(known, target - start, 0), objective)
    # The softmax gives nothing to an id outside the range.
    losses = losses.masked_fill(counted & ~known, torch.inf)
    weighted = coefficient * losses
    if reduction == "none":
        loss = weighted
    else:
        loss = weighted.sum() if reduction == "sum" else weighted.sum() / coefficient.sum()
    predicted = (logits.detach().argmax(-1) + start).masked_fill(~counted, -1)
    return loss, losses.detach().masked_fill(~counted, 0), predicted


def _losses(logits: Tensor, target: Tensor, objective: Objective) -> Tensor:
    log_p = logits.log_softmax(-1)
    losses = -log_p.gather(-1, target[..., None]).squeeze(-1)
    if objective.label_smoothing:
        share = objective.label_smoothing
        losses = (1 - share) * losses - share * log_p.mean(-1)
    if objective.z_loss:
        losses = losses + objective.z_loss * logits.logsumexp(-1).square()
    return losses
