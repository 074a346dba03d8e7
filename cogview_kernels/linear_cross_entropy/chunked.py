# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy over chunks of tokens, with PyTorch's own matrix products: any device.

Letters: N tokens, C width, V ids in the softmax. A chunk of n tokens holds n V logits in float32 (and once
more in the dtype of ``hidden`` where that is narrower), about CHUNK_BYTES.

FLOPs: 2 N C V for the losses, 6 N C V with gradients (three products).
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20


def linear_cross_entropy_chunked(
    hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(losses, dhidden, dweight)`` for ``weight`` already cut to the ids in the softmax.

    ``target`` counts from the first of these ids; ``losses`` are multiplied by ``coefficient``, and float32
    as ``dweight`` is. With ``gradients`` the last two are those of ``losses.sum()``, else they are empty.
    """
    N, V = hidden.shape[0], weight.shape[0]
    losses = torch.zeros(N, dtype=torch.float32, device=hidden.device)
    dhidden = torch.zeros_like(hidden) if gradients else hidden.new_empty(0)
    dweight = torch.zeros(weight.shape if gradients else 0, dtype=torch.float32, device=weight.device)
    rows = torch.arange(N, device=hidden.device)
    if hidden.device.type == "cpu":  # elsewhere their number would cost a synchronisation
        rows = rows[coefficient != 0]
    for index in rows.split(max(16, CHUNK_BYTES // (4 * V))):
        h, t, c = hidden[index], target[index], coefficient[index]
        known = (t >= 0) & (t < V)
        t = torch.where(known, t, 0)[:, None]
        logits = torch.mm(h, weight.T).float()
        # The maximum goes first, from the target's logit too: a logarithm added to 6e4 would lose its digits.
        logits -= logits.amax(-1, keepdim=True)
        picked = logits.gather(1, t).squeeze(1).masked_fill(~known, -torch.inf)
        total = logits.exp_().sum(-1)
        losses[index] = torch.where(c != 0, c * (total.log() - picked), 0)
        if gradients:
            # c * (softmax - onehot), in place.
            logits *= (c / total)[:, None]
            logits.scatter_add_(1, t, torch.where(known, -c, 0)[:, None])
            dlogits = logits.to(hidden.dtype)
            dhidden[index] = torch.mm(dlogits, weight)
            if dlogits.dtype == torch.float32:
                dweight.addmm_(dlogits.T, h)
            else:
                dweight += torch.mm(dlogits.T, h)
    return losses, dhidden, dweight
