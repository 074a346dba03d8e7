# SPDX-License-Identifier: Apache-2.0
"""Decode attention through one ``scaled_dot_product_attention`` call, on any device that PyTorch has.

With a layout, pivots and window are gathered first where that is shorter than the cache. All shapes follow
from those of the arguments, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def decode_attention_sdpa(
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
    Tq, S = q.shape[2], k_cache.shape[2]
    query = (lengths.long()[:, None] - Tq + torch.arange(Tq, device=q.device))[..., None]
    keys, values = k_cache, v_cache
    if pivots is None:
        key = torch.arange(S, device=q.device).expand(q.shape[0], 1, -1)
        seen = key <= query
    else:
        key, near, far = _regions(pivots, query, S, block_size, window_blocks)
        if key.shape[-1] != S:
            index = key.clamp(0, S - 1)[:, 0]
            index = index[:, None, :, None].expand(-1, k_cache.shape[1], -1, k_cache.shape[3])
            keys, values = k_cache.gather(2, index), v_cache.gather(2, index)
        seen = near | far
    # A query before position 0 sees nothing: it is given every key, so that no row is empty, then zeroed.
    blind = query < 0
    # What lies past the end may be anything, NaN included, which no weight of 0 would remove.
    unwritten = ((key < 0) | (key >= lengths[:, None, None]))[:, 0, None, :, None]
    keys, values = keys.masked_fill(unwritten, 0), values.masked_fill(unwritten, 0)
    mask = (seen | blind)[:, None]
    if pivots is not None and pivot_bias != 0:
        mask = (far.to(q.dtype) * pivot_bias)[:, None].masked_fill(~mask, -torch.inf)
    out = scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k_cache.shape[1]
    )
    return out.masked_fill(blind[:, None], 0)


def _regions(
    pivots: Tensor, query: Tensor, S: int, block_size: int, window_blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(key [B, 1, n], near, far [B, Tq, n])``: positions to read and the region each query sees them in.

    A position may stand among the pivots and in the window; each query sees it in one of the two alone.
    """
    B, Tq, _ = query.shape
    device = query.device
    window_start = (query // block_size - window_blocks + 1) * block_size
    P, span = pivots.shape[1], window_blocks * block_size + Tq
    pivots = pivots.long()
    pivots = pivots.masked_fill(pivots >= S, -1)
    if P + span >= S:
        key = torch.arange(S, device=device).expand(B, 1, -1)
        is_pivot = torch.zeros(B, S + 1, dtype=torch.bool, device=device)
        is_pivot = is_pivot.scatter(1, pivots.masked_fill(pivots < 0, S), True)[:, None, :S]
        far = is_pivot & (key < window_start)
        near = (key >= window_start) & (key <= query)
        return key, near, far
    window = window_start[:, :1] + torch.arange(span, device=device)
    key = torch.cat([pivots[:, None], window], 2)
    listed = torch.arange(P + span, device=device) < P
    far = listed & (key >= 0) & (key < window_start)
    near = ~listed & (key >= 0) & (key >= window_start) & (key <= query)
    return key, near, far
