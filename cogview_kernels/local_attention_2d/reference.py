# SPDX-License-Identifier: Apache-2.0
"""Local attention in two dimensions as one dense masked softmax in eager PyTorch: any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels._dropout import Dropout, keep_mask
from cogview_kernels.local_attention_2d.window import Keys, Window


def local_attention_2d_reference(
    q: Tensor, keys: Keys, window: Window, scale: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`cogview_kernels.local_attention_2d`; ``(out, lse)`` in the dtype of ``q``."""
    B, H, T, _ = q.shape
    G = H // keys.k.shape[1]
    k, v = torch.cat([keys.k, keys.extra_k], 2), torch.cat([keys.v, keys.extra_v], 2)
    k, v = (x.repeat_interleave(G, dim=1) if G > 1 else x for x in (k, v))
    E = keys.extra_k.shape[2]
    extra = (
        torch.ones(B, E, dtype=torch.bool, device=q.device) if keys.extra_mask is None else keys.extra_mask
    )
    seen = torch.cat([window.dense_mask(q.device).expand(B, -1, -1), extra[:, None].expand(-1, T, -1)], dim=2)
    logits = ((q * scale) @ k.transpose(-1, -2)).masked_fill(~seen[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    # Not exp(logits - lse): where logits are huge, lse has lost its log(sum) to rounding.
    probs = logits.softmax(-1)
    if dropout is not None:
        sample, head = torch.arange(B, device=q.device), torch.arange(H, device=q.device)
        query, key = torch.arange(T, device=q.device), torch.arange(k.shape[2], device=q.device)
        r0, r1 = dropout.words(query, head[:, None], sample[:, None, None])
        probs = probs * keep_mask(dropout, (r0[..., None], r1[..., None]), key) / (1 - dropout.p)
    return probs @ v, lse
