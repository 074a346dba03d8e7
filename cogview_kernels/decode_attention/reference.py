# SPDX-License-Identifier: Apache-2.0
"""Decode attention as a dense masked softmax over the cache in eager PyTorch: any device, any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    pivots: Tensor | None = None,
    block_size: int = 1,
    window_blocks: int = 1,
    pivot_bias: float = 0.0,
) -> Tensor:
    """See :func:`cogview_kernels.decode_attention`; computed in the dtype of ``q``."""
    B, H, Tq, _ = q.shape
    S = k_cache.shape[2]
    G = H // k_cache.shape[1]
    key = torch.arange(S, device=q.device)
    query = lengths.long()[:, None] - Tq + torch.arange(Tq, device=q.device)
    seen = key <= query[..., None]
    # What lies past the end may be anything, NaN included, which no weight of 0 would remove.
    written = (key < lengths[:, None])[:, None, :, None]
    k, v = (x.masked_fill(~written, 0).repeat_interleave(G, dim=1) for x in (k_cache, v_cache))
    logits = (q * scale) @ k.transpose(-1, -2)
    if pivots is not None:
        left_of_window = key // block_size <= (query // block_size - window_blocks)[..., None]
        is_pivot = torch.zeros(B, S + 1, dtype=torch.bool, device=q.device)
        is_pivot = is_pivot.scatter(1, pivots.long().masked_fill(pivots < 0, S), True)[:, None, :S]
        logits = logits + (is_pivot & left_of_window)[:, None].to(q.dtype) * pivot_bias
        seen = seen & (is_pivot | ~left_of_window)
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    # A query before position 0 sees nothing: zeros, not NaN.
    blind = ~seen.any(-1)[:, None, :, None]
    return logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ v
