# SPDX-License-Identifier: Apache-2.0
"""Decode attention through one ``scaled_dot_product_attention`` call, on any device that PyTorch has.

With a layout, pivots and window are gathered first where that is shorter than the cache. All shapes follow
from those of the arguments, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cogview_kernels.decode_attention.reference import query_positions
from cogview_kernels.layout import ThreeRegionLayout, window_start


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    layout: ThreeRegionLayout | None,
    scale: float,
    starts: Tensor | None = None,
) -> Tensor:
    """See :func:`cogview_kernels.decode_attention`; computed in the dtype of ``q``."""
    S = k_cache.shape[2]
    query = query_positions(q, lengths)
    keys, values = k_cache, v_cache
    if layout is None:
        key = torch.arange(S, device=q.device).expand(q.shape[0], 1, -1)
        seen = key <= query[..., None]
    else:
        key, near, far = _regions(layout, query, S, starts)
        if key.shape[-1] != S:
            index = key.clamp(0, S - 1)[:, 0]
            index = index[:, None, :, None].expand(-1, k_cache.shape[1], -1, k_cache.shape[3])
            keys, values = k_cache.gather(2, index), v_cache.gather(2, index)
        seen = near | far
    origin: Tensor | int = 0 if starts is None else starts.clamp(min=0)[:, None, None]
    seen = seen & (key >= origin)
    # A query before the first key sees nothing: it is given every key, so that no row is empty, then zeroed.
    blind = query[..., None] < origin
    # What lies past the end may be anything, NaN included, which no weight of 0 would remove.
    unwritten = ((key < origin) | (key >= lengths[:, None, None]))[:, 0, None, :, None]
    keys, values = keys.masked_fill(unwritten, 0), values.masked_fill(unwritten, 0)
    mask = (seen | blind)[:, None]
    if layout is not None and (layout.pivot_bias != 0 or layout.density != 1):
        mask = (far.to(q.dtype) * layout.far_bias(q))[:, None].masked_fill(~mask, -torch.inf)
    out = scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k_cache.shape[1]
    )
    return out.masked_fill(blind[:, None], 0)


def _regions(
    layout: ThreeRegionLayout, query: Tensor, S: int, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(key [B, 1, n], near, far [B, Tq, n])``: positions to read and the region each query sees them in.

    A position may stand among the pivots and in the window; each query sees it in one of the two alone.
    """
    B, Tq = query.shape
    block_size, window_blocks = layout.window(S)
    P, span = layout.pivots.shape[1], window_blocks * block_size + Tq
    # A pivot past the cache is no key at all: nothing may be read there.
    pivots = layout.pivots.long()
    pivots = pivots.masked_fill(pivots >= S, -1)
    if P + span >= S:
        key = torch.arange(S, device=query.device).expand(B, 1, -1)
        inside = ThreeRegionLayout.unchecked(pivots, block_size, window_blocks, layout.pivot_bias)
        return key, *inside.regions(query, S, starts)
    query = query[..., None]
    origin: Tensor | int = 0 if starts is None else starts.clamp(min=0)[:, None, None]
    start = window_start(query, block_size, window_blocks, origin)
    window = start[:, :1] + torch.arange(span, device=query.device)
    key = torch.cat([pivots[:, None], window], 2)
    listed = torch.arange(P + span, device=query.device) < P
    far = listed & (key >= 0) & (key < start)
    near = ~listed & (key >= 0) & (key >= start) & (key <= query)
    return key, near, far
