# SPDX-License-Identifier: Apache-2.0
"""Three-region attention as one dense masked softmax in eager PyTorch: any device, any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _random


def region_masks(pivots: Tensor, block_size: int, window_blocks: int, T: int) -> tuple[Tensor, Tensor]:
    """``(window [T, T], far [B, T, T])``: which keys (last dimension) a query sees, and in which region."""
    position = torch.arange(T, device=pivots.device)
    block = position // block_size
    # Column T takes the -1 that pad; a pivot past it is an index error.
    is_pivot = torch.zeros(pivots.shape[0], T + 1, dtype=torch.bool, device=pivots.device)
    is_pivot = is_pivot.scatter(1, pivots.long().masked_fill(pivots < 0, T), True)[:, :T]
    left_of_window = block[None, :] <= block[:, None] - window_blocks
    window = (position[None, :] <= position[:, None]) & ~left_of_window
    return window, is_pivot[:, None, :] & left_of_window


def three_region_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pivots: Tensor,
    block_size: int,
    window_blocks: int,
    pivot_bias: float,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`cogview_kernels.three_region_attention`; ``(out, lse)`` in the dtype of ``q``."""
    B, H, T, _ = q.shape
    G = H // k.shape[1]
    k, v = (x.repeat_interleave(G, dim=1) if G > 1 else x for x in (k, v))
    window, far = region_masks(pivots, block_size, window_blocks, T)
    logits = (q * scale) @ k.transpose(-1, -2)
    logits = logits + far[:, None].to(q.dtype) * pivot_bias
    logits = logits.masked_fill(~(window | far)[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    # Not exp(logits - lse): where logits are huge, lse has lost its log(sum) to rounding.
    probs = logits.softmax(-1)
    if dropout_p > 0:
        assert seed is not None
        device = q.device
        sample, head, query = (torch.arange(n, device=device) for n in (B, H, T))
        rows = _random.philox(seed.to(device), query, head[:, None], sample[:, None, None])
        keep = _random.keep_mask(dropout_p, (rows[0][..., None], rows[1][..., None]), query)
        probs = probs * keep / (1 - dropout_p)
    return probs @ v, lse
