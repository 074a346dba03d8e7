# SPDX-License-Identifier: Apache-2.0
"""Local attention in two dimensions through ``scaled_dot_product_attention``, on any device that PyTorch has.

One masked call for each strip of rows, over the rows of keys that the strip sees, which lie together in
memory. A small grid takes one call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cogview_kernels.local_attention_2d.window import Keys, Window

# Up to so many keys the calls of several strips cost more than the keys they skip.
DENSE_KEYS = 512


def limit(dropout_p: float, return_lse: bool) -> str:
    """What ``scaled_dot_product_attention`` cannot do; empty when it can."""
    missing = "dropout" if dropout_p > 0 else "return_lse" if return_lse else ""
    return missing and f"the sdpa backend has no {missing}; use backend='reference'"


def forward(q: Tensor, keys: Keys, window: Window, scale: float) -> Tensor:
    """See :func:`cogview_kernels.local_attention_2d`; in the dtype of ``q``."""
    if window.keys <= DENSE_KEYS:
        return _strip(q, keys, window, scale, (0, window.height))
    rows = min(window.height, window.kernel_height)
    strips = range(0, window.height, rows)
    return torch.cat([_strip(q, keys, window, scale, (y, min(y + rows, window.height))) for y in strips], 2)


def _strip(q: Tensor, keys: Keys, window: Window, scale: float, cell_rows: tuple[int, int]) -> Tensor:
    """The queries of the cells in these rows."""
    k, v, extra_k, extra_v, extra_mask = keys
    key_rows = window.key_rows(*cell_rows)
    mask = window.dense_mask(q.device, cell_rows, key_rows)[None]
    E = extra_k.shape[2]
    near = slice(key_rows[0] * window.width, key_rows[1] * window.width)
    k, v = k[:, :, near], v[:, :, near]
    if E > 0:
        k, v = torch.cat([k, extra_k], 2), torch.cat([v, extra_v], 2)
        if extra_mask is None:
            extra_mask = torch.ones(1, E, dtype=torch.bool, device=q.device)
        samples, queries, _ = torch.broadcast_shapes(mask.shape, (extra_mask.shape[0], 1, 1))
        mask = torch.cat(
            [mask.expand(samples, -1, -1), extra_mask[:, None].expand(samples, queries, -1)], dim=2
        )
    queries_a_row = window.width * window.query_scale**2
    return scaled_dot_product_attention(
        q[:, :, cell_rows[0] * queries_a_row : cell_rows[1] * queries_a_row],
        k,
        v,
        attn_mask=mask[:, None],
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
