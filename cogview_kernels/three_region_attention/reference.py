# SPDX-License-Identifier: Apache-2.0
"""Three-region attention as one dense masked softmax in eager PyTorch: any device, any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels._dropout import Dropout, keep_mask
from cogview_kernels.layout import ThreeRegionLayout


def three_region_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    scale: float,
    dropout: Dropout | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`cogview_kernels.three_region_attention`; ``(out, lse)`` in the dtype of ``q``."""
    B, H, T, _ = q.shape
    G = H // k.shape[1]
    k, v = (x.repeat_interleave(G, dim=1) if G > 1 else x for x in (k, v))
    position = torch.arange(T, device=q.device)
    window, far = layout.regions(position, T, starts)
    logits = (q * scale) @ k.transpose(-1, -2)
    logits = logits + far[:, None].to(q.dtype) * layout.far_bias(q)
    seen = (window | far)[:, None]
    blind = None
    if starts is not None:
        # A query before its start sees nothing: it is given every key, so that no row is empty, then zeroed.
        blind = (position < starts[:, None])[:, None, :, None]
        seen = seen | blind
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    # Not exp(logits - lse): where logits are huge, lse has lost its log(sum) to rounding.
    probs = logits.softmax(-1)
    if dropout is not None:
        sample, head = torch.arange(B, device=q.device), torch.arange(H, device=q.device)
        r0, r1 = dropout.words(position, head[:, None], sample[:, None, None])
        probs = probs * keep_mask(dropout, (r0[..., None], r1[..., None]), position) / (1 - dropout.p)
    if blind is None:
        return probs @ v, lse
    return (probs @ v).masked_fill(blind, 0), lse.masked_fill(blind[..., 0], -torch.inf)
