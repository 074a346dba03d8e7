# SPDX-License-Identifier: Apache-2.0
"""One decoding step over a cache with scaled_dot_product_attention and with FlexAttention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.definitions import Case, Forward, Inputs, Variant
from benchmarks.rivals.attention import gather_keys, rows_of

CACHE = "SDPA over the cache"
GATHERED = "SDPA on gathered rows"


def _sdpa(x: Inputs, case: Case) -> Forward:
    """No mask: right only because every position of the cache is written."""
    return lambda: F.scaled_dot_product_attention(x.q, x.k_cache, x.v_cache)


def _sdpa_masked(x: Inputs, case: Case) -> Forward:
    key = torch.arange(case.shape.S, device=x.q.device)

    def forward() -> Tensor:
        mask = (key < x.lengths[:, None])[:, None, None]
        return F.scaled_dot_product_attention(x.q, x.k_cache, x.v_cache, attn_mask=mask)

    return forward


def _flex(x: Inputs, case: Case) -> Forward:
    lengths = x.lengths

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < lengths[b]

    block_mask = create_block_mask(mask_mod, case.shape.B, None, 1, case.shape.S, device=x.q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(x.q, x.k_cache, x.v_cache, block_mask=block_mask)


def _gathered(x: Inputs, case: Case) -> Forward:
    """Pivots left of the window and the window, gathered at each step, in the order of memory."""
    s, pivots = case.shape, x.layout.pivots.long()
    window_start = s.regions.window_start(s.S - 1)
    is_far = (pivots >= 0) & (pivots < window_start)
    far = pivots.masked_fill(~is_far, s.S).sort(1).values[:, : int(is_far.sum(1).max())]
    window = torch.arange(window_start, s.S, device=pivots.device)
    rows = rows_of(x.k_cache, torch.cat([far, window.expand(s.B, -1)], 1))
    bias = torch.where(far < s.S, x.layout.pivot_bias, float("-inf"))
    bias = F.pad(bias, (0, window.numel())).to(case.dtype)[:, None, None]

    def forward() -> Tensor:
        keys, values = gather_keys(x.k_cache, rows), gather_keys(x.v_cache, rows)
        return F.scaled_dot_product_attention(x.q, keys, values, attn_mask=bias)

    return forward


def _regions_only(case: Case, device: torch.device) -> str:
    return "" if case.shape.regions else "all keys are read here"


VARIANTS = (
    Variant(CACHE, _sdpa, truth="dense", note="reads every key, without a mask"),
    Variant("SDPA over the cache, masked", _sdpa_masked, truth="dense", note="reads every key"),
    Variant("FlexAttention over the cache", _flex, truth="dense", note="reads every key"),
    Variant(GATHERED, _gathered, why_not=_regions_only),
)
