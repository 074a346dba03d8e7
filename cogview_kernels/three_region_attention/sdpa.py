# SPDX-License-Identifier: Apache-2.0
"""Three-region attention through ``scaled_dot_product_attention``, on any device that PyTorch has.

One call per query block over [sorted gathered pivots left of the window, window]; the first ``window_blocks``
blocks, which see everything before them, share one causal call. Where the layout is not causal, each call has
all pivots, and masks those in the window. Short sequences and samples that start apart take one masked call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cogview_kernels import _torch_ops
from cogview_kernels.layout import ThreeRegionLayout, window_start, window_stop

# Up to here the calls of the loop cost more than the tiles they skip.
DENSE_LENGTH = 512


def limit(dropout_p: float, return_lse: bool) -> str:
    """What ``scaled_dot_product_attention`` cannot do; empty when it can."""
    missing = "dropout" if dropout_p > 0 else "return_lse" if return_lse else ""
    return missing and f"the sdpa backend has no {missing}; use backend='reference'"


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: ThreeRegionLayout, scale: float, starts: Tensor | None = None
) -> Tensor:
    """See :func:`cogview_kernels.three_region_attention`; in the dtype of ``q``."""
    T = q.shape[2]
    block_size, window_blocks = layout.window(T)
    if starts is not None:
        # The rows of samples that start apart do not fall into blocks together.
        return _masked(q, k, v, layout, scale, starts)
    if block_size * window_blocks >= T:
        gqa = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, is_causal=layout.causal, scale=scale, enable_gqa=gqa)
    if T <= DENSE_LENGTH:
        return _masked(q, k, v, layout, scale, None)
    return _by_blocks(q, k, v, layout, scale)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, layout: ThreeRegionLayout, scale: float, starts: Tensor | None
) -> Tensor:
    """One call over all keys."""
    T, gqa = q.shape[2], q.shape[1] != k.shape[1]
    position = torch.arange(T, device=q.device)
    window, far = layout.regions(position, T, starts)
    seen = window | far
    blind = None
    if starts is not None:
        # A query before its start sees nothing: it is given every key, so that no row is empty, then zeroed.
        blind = (position < starts[:, None])[..., None]
        seen = seen | blind
    mask = (far.to(q.dtype) * layout.far_bias(q)).masked_fill(~seen, -torch.inf)[:, None]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out if blind is None else out.masked_fill(blind[:, None], 0)


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, layout: ThreeRegionLayout, scale: float) -> Tensor:
    """One call for the blocks that see all before them, if causal, then one for each block."""
    T, gqa = q.shape[2], q.shape[1] != k.shape[1]
    block_size, window_blocks = layout.window(T)
    B, P = layout.pivots.shape
    sorted_pivots = layout.sorted_pivots(T)
    index = sorted_pivots.clamp(max=T - 1)[:, None, :, None]
    k_far, v_far = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
    blocks = range(block_size * window_blocks if layout.causal else 0, T, block_size)
    windows = [max(0, window_start(start, block_size, window_blocks)) for start in blocks]
    # How many pivots are far: exact where reading them costs no wait, else at most so many; the mask hides
    # those that are too many.
    if not layout.causal:
        far_counts = [P] * len(windows)
    elif _torch_ops.values_are_readable(sorted_pivots):
        edges = torch.tensor(windows).expand(B, -1).contiguous()
        far_counts = torch.searchsorted(sorted_pivots, edges).amax(0).tolist()
    else:
        far_counts = [min(P, window) for window in windows]

    far_bias = layout.far_bias(q)
    parts = []
    if layout.causal:
        first = slice(0, block_size * window_blocks)
        parts.append(
            scaled_dot_product_attention(
                q[:, :, first], k[:, :, first], v[:, :, first], is_causal=True, scale=scale, enable_gqa=gqa
            )
        )
    for start, window, count in zip(blocks, windows, far_counts, strict=True):
        stop = min(T, start + block_size)
        end = min(T, window_stop(stop - 1, block_size, window_blocks, layout.causal))
        pivots = sorted_pivots[:, None, None, :count]
        is_near = pivots >= window if layout.causal else (pivots >= window) & (pivots < end) | (pivots == T)
        far = far_bias.expand(B, 1, 1, count).masked_fill(is_near, -torch.inf)
        after = torch.full(
            (stop - start, end - window), -torch.inf if layout.causal else 0, dtype=q.dtype, device=q.device
        )
        near = after.triu(start - window + 1)
        mask = torch.cat([far.expand(-1, -1, stop - start, -1), near.expand(B, 1, -1, -1)], dim=3)
        parts.append(
            scaled_dot_product_attention(
                q[:, :, start:stop],
                torch.cat([k_far[:, :, :count], k[:, :, window:end]], 2),
                torch.cat([v_far[:, :, :count], v[:, :, window:end]], 2),
                attn_mask=mask,
                scale=scale,
                enable_gqa=gqa,
            )
        )
    return torch.cat(parts, 2)
