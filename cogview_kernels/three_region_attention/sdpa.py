# SPDX-License-Identifier: Apache-2.0
"""Three-region attention through ``scaled_dot_product_attention``, on any device that PyTorch has.

One call per query block over [sorted gathered pivots left of the window, window]; the first ``window_blocks``
blocks, which see everything before them, share one causal call. Short sequences take one masked call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cogview_kernels.three_region_attention.reference import region_masks

# Up to here the calls of the loop cost more than the tiles they skip.
DENSE_LENGTH = 512


def three_region_attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pivots: Tensor,
    block_size: int,
    window_blocks: int,
    pivot_bias: float,
    scale: float,
) -> Tensor:
    """See :func:`cogview_kernels.three_region_attention`; in the dtype of ``q``, no dropout."""
    T, w, W = q.shape[2], block_size, window_blocks
    gqa = q.shape[1] != k.shape[1]
    if w * W >= T:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    if T <= DENSE_LENGTH:
        window, far = region_masks(pivots, w, W, T)
        mask = torch.zeros(far.shape, dtype=q.dtype, device=q.device).masked_fill(far, pivot_bias)
        mask = mask.masked_fill(~(window | far), -torch.inf)[:, None]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)

    ordered = pivots.long().masked_fill(pivots < 0, T).sort(1).values
    index = ordered.clamp(max=T - 1)[:, None, :, None]
    k_far, v_far = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
    starts = range(w * W, T, w)
    # Prefix lengths: exact where reading them costs no wait, else bounds; the mask hides what is too much.
    if pivots.device.type == "cpu" and not torch.compiler.is_compiling():
        edges = torch.tensor([start - (W - 1) * w for start in starts]).expand(pivots.shape[0], -1)
        prefixes = torch.searchsorted(ordered, edges.contiguous()).amax(0).tolist()
    else:
        prefixes = [min(pivots.shape[1], start - (W - 1) * w) for start in starts]

    first = slice(0, w * W)
    parts = [
        scaled_dot_product_attention(
            q[:, :, first], k[:, :, first], v[:, :, first], is_causal=True, scale=scale, enable_gqa=gqa
        )
    ]
    for start, prefix in zip(starts, prefixes, strict=True):
        stop, window_start = min(T, start + w), start - (W - 1) * w
        far = torch.full((pivots.shape[0], 1, 1, prefix), pivot_bias, dtype=q.dtype, device=q.device)
        far = far.masked_fill((ordered[:, None, None, :prefix] >= window_start), -torch.inf)
        diagonal = torch.full((stop - start, stop - window_start), -torch.inf, dtype=q.dtype, device=q.device)
        near = diagonal.triu(start - window_start + 1)
        mask = torch.cat(
            [far.expand(-1, -1, stop - start, -1), near.expand(pivots.shape[0], 1, -1, -1)], dim=3
        )
        parts.append(
            scaled_dot_product_attention(
                q[:, :, start:stop],
                torch.cat([k_far[:, :, :prefix], k[:, :, window_start:stop]], 2),
                torch.cat([v_far[:, :, :prefix], v[:, :, window_start:stop]], 2),
                attn_mask=mask,
                scale=scale,
                enable_gqa=gqa,
            )
        )
    return torch.cat(parts, 2)
