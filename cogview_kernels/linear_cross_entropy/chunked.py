# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy over chunks of tokens, with PyTorch's own matrix products: any device.

Letters: N tokens, C width, V ids in the softmax. A chunk of n tokens holds n V logits in float32 (and once
more in the dtype of ``hidden`` where that is narrower), about CHUNK_BYTES, forward and backward.

FLOPs: 6 N C V with gradients made during the forward pass (three products); 8 N C V where the gradient of
each loss is known only later (``reduction="none"``), as the logits are made twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20


def _chunk_rows(vocabulary: int) -> int:
    return max(16, CHUNK_BYTES // (4 * max(vocabulary, 1)))


def _counted(coefficient: Tensor) -> Tensor | None:
    """Rows with a non-zero coefficient; None for all, and off the CPU, where asking would synchronise."""
    if coefficient.device.type != "cpu" or bool(coefficient.all()):
        return None
    return coefficient.nonzero().squeeze(1)


def _gradient_chunk(
    logits: Tensor, lse: Tensor, target: Tensor, known: Tensor, coefficient: Tensor, dtype: torch.dtype
) -> Tensor:
    """``coefficient * (softmax(logits) - onehot(target))`` in place of ``logits``, rounded to ``dtype``."""
    logits.sub_(lse[:, None]).exp_().mul_(coefficient[:, None])
    logits.scatter_add_(1, target[:, None], torch.where(known, -coefficient, 0)[:, None])
    return logits.to(dtype)


def linear_cross_entropy_chunked(
    hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(losses, lse, dhidden, dweight)`` for ``weight`` already cut to the ids in the softmax.

    ``target`` counts from the first of these ids; ``losses`` are multiplied by ``coefficient``, and float32
    as ``lse`` and ``dweight`` are. With ``gradients`` the last two are those of ``losses.sum()``, else they
    are empty. They are not divided by a sum of weights, so float16 does not lose them below its range.
    """
    N, V = hidden.shape[0], weight.shape[0]
    losses = torch.zeros(N, dtype=torch.float32, device=hidden.device)
    lse = torch.zeros_like(losses)
    dhidden = torch.zeros_like(hidden) if gradients else hidden.new_empty(0)
    dweight = torch.zeros(weight.shape if gradients else 0, dtype=torch.float32, device=weight.device)
    counted = _counted(coefficient)
    rows = torch.arange(N, device=hidden.device) if counted is None else counted
    for index in rows.split(_chunk_rows(V)):
        h, t, c = hidden[index], target[index], coefficient[index]
        known = (t >= 0) & (t < V)
        t = torch.where(known, t, 0)
        logits = torch.mm(h, weight.T).float()
        chunk_lse = logits.logsumexp(-1)
        picked = logits.gather(1, t[:, None]).squeeze(1).masked_fill(~known, -torch.inf)
        losses[index] = torch.where(c != 0, c * (chunk_lse - picked), 0)
        lse[index] = chunk_lse
        if gradients:
            dlogits = _gradient_chunk(logits, chunk_lse, t, known, c, hidden.dtype)
            dhidden[index] = torch.mm(dlogits, weight)
            _accumulate(dweight, dlogits, h)
    return losses, lse, dhidden, dweight


def linear_cross_entropy_chunked_backward(
    hidden: Tensor, weight: Tensor, target: Tensor, lse: Tensor, coefficient: Tensor
) -> tuple[Tensor, Tensor]:
    """``(dhidden, dweight)`` of ``(coefficient * cross_entropy).sum()``, from the forward pass's ``lse``."""
    V = weight.shape[0]
    dhidden = torch.zeros_like(hidden)
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    counted = _counted(coefficient)
    rows = torch.arange(hidden.shape[0], device=hidden.device) if counted is None else counted
    for index in rows.split(_chunk_rows(V)):
        h, t = hidden[index], target[index]
        known = (t >= 0) & (t < V)
        logits = torch.mm(h, weight.T).float()
        dlogits = _gradient_chunk(
            logits, lse[index], torch.where(known, t, 0), known, coefficient[index], hidden.dtype
        )
        dhidden[index] = torch.mm(dlogits, weight)
        _accumulate(dweight, dlogits, h)
    return dhidden, dweight.to(weight.dtype)


def _accumulate(dweight: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    if dlogits.dtype == torch.float32:
        dweight.addmm_(dlogits.T, hidden)
    else:
        dweight += torch.mm(dlogits.T, hidden)
