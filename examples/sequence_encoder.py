# SPDX-License-Identifier: Apache-2.0
"""Attention of an encoder of long sequences in BigBird's manner: a window to both sides, global tokens and
random ones.

Every token sees its window, all global tokens and the random ones of its sample, under one softmax. A second,
dense call lets the global tokens see everything. Both are compared with one dense call under the same mask.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_kernels import ThreeRegionLayout, three_region_attention

B, H, D, T, GLOBAL, RANDOM, ROUNDS = 1, 4, 64, 2048, 8, 56, 5
BLOCK_SIZE, WINDOW_BLOCKS = 64, 2  # a block and its two neighbours


def encoder_attention(q: Tensor, k: Tensor, v: Tensor, layout: ThreeRegionLayout) -> Tensor:
    """``[B, H, T, D]``; the global tokens come first."""
    seeing_all = F.scaled_dot_product_attention(q[:, :, :GLOBAL], k, v)
    out = three_region_attention(q, k, v, layout)
    assert isinstance(out, Tensor)
    return torch.cat([seeing_all, out[:, :, GLOBAL:]], 2)


torch.manual_seed(0)
q, k, v = (torch.randn(B, H, T, D, requires_grad=True) for _ in range(3))
is_global = (torch.arange(T) < GLOBAL).expand(B, T)
layout = ThreeRegionLayout.sample(
    is_global, GLOBAL + RANDOM, block_size=BLOCK_SIZE, window_blocks=WINDOW_BLOCKS,
    density_correction=False, causal=False,
)  # fmt: skip
mask = (layout.dense_mask(T) | is_global[..., None])[:, None]
calls = {
    "dense": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    "sparse": lambda: encoder_attention(q, k, v, layout),
}
difference = (calls["dense"]() - calls["sparse"]()).abs().max().item()
times: dict[str, list[float]] = {name: [] for name in calls}
for turn in range(ROUNDS + 1):
    for name, call in calls.items():
        start = time.perf_counter()
        torch.autograd.grad(call().sum(), (q, k, v))
        if turn > 0:  # the first round warms up
            times[name].append(time.perf_counter() - start)
dense, sparse = (statistics.median(taken) for taken in times.values())
print(f"{T} tokens, {GLOBAL} of them global, largest difference {difference:.0e}")
print(layout.plan(T))
print(f"forward and backward: {dense:.3f} s dense and masked, {sparse:.3f} s three regions")
print(f"ratio: {dense / sparse:.2f}x as fast")
