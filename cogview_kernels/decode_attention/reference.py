# SPDX-License-Identifier: Apache-2.0
"""Decode attention as a dense masked softmax over the cache in eager PyTorch: any device, any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels.layout import ThreeRegionLayout


def query_positions(q: Tensor, lengths: Tensor) -> Tensor:
    """``[B, Tq]``; below 0 for queries before the start of their sequence."""
    Tq = q.shape[2]
    return lengths.long()[:, None] - Tq + torch.arange(Tq, device=q.device)


def decode_attention_reference(
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
    G = q.shape[1] // k_cache.shape[1]
    key = torch.arange(S, device=q.device)
    query = query_positions(q, lengths)
    # What lies past the end or before the start may be anything, NaN included: no weight of 0 removes it.
    written = key < lengths[:, None]
    if starts is not None:
        written = written & (key >= starts[:, None])
    written = written[:, None, :, None]
    k, v = (x.masked_fill(~written, 0).repeat_interleave(G, dim=1) for x in (k_cache, v_cache))
    logits = (q * scale) @ k.transpose(-1, -2)
    if layout is None:
        seen = key <= query[..., None]
    else:
        window, far = layout.regions(query, S, starts)
        seen = window | far
        logits = logits + far[:, None].to(q.dtype) * layout.far_bias(q)
    if starts is not None:
        seen = seen & (key >= starts[:, None, None])
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    # A query before position 0 or its start sees nothing: zeros, not NaN.
    blind = ~seen.any(-1)[:, None, :, None]
    return logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ v
