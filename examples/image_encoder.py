# SPDX-License-Identifier: Apache-2.0
"""Attention of an image encoder in BigBird's manner: local windows, and global tokens that see and are seen.

Every patch sees its neighbours in the raster and all global tokens, under one softmax. A second, dense
call lets the global tokens see everything. Both are compared with one dense call under the same mask.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_kernels import local_attention_2d

B, H, D, GRID, WINDOW, GLOBAL, ROUNDS = 1, 4, 64, (32, 32), (5, 5), 8, 5
N = GRID[0] * GRID[1]


def encoder_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``[B, H, GLOBAL + N, D]``: first the global tokens, then the patches in raster order."""
    seen_by_all = {"extra_k": k[:, :, :GLOBAL], "extra_v": v[:, :, :GLOBAL]}
    patches = local_attention_2d(
        q[:, :, GLOBAL:], k[:, :, GLOBAL:], v[:, :, GLOBAL:], GRID, WINDOW, **seen_by_all
    )
    seeing_all = F.scaled_dot_product_attention(q[:, :, :GLOBAL], k, v)
    return torch.cat([seeing_all, patches], 2)


def dense_mask() -> Tensor:
    """Which of all tokens a token sees, as a dense kernel needs it."""
    row, column = torch.arange(N) // GRID[1], torch.arange(N) % GRID[1]
    near = (row[:, None] - row).abs() <= WINDOW[0] // 2
    near &= (column[:, None] - column).abs() <= WINDOW[1] // 2
    mask = torch.ones(GLOBAL + N, GLOBAL + N, dtype=torch.bool)
    mask[GLOBAL:, GLOBAL:] = near
    return mask


torch.manual_seed(0)
q, k, v = (torch.randn(B, H, GLOBAL + N, D, requires_grad=True) for _ in range(3))
mask = dense_mask()
calls = {
    "dense": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    "local": lambda: encoder_attention(q, k, v),
}
difference = (calls["dense"]() - calls["local"]()).abs().max().item()
times: dict[str, list[float]] = {name: [] for name in calls}
for turn in range(ROUNDS + 1):
    for name, call in calls.items():
        start = time.perf_counter()
        torch.autograd.grad(call().sum(), (q, k, v))
        if turn > 0:  # the first round warms up
            times[name].append(time.perf_counter() - start)
dense, local = (statistics.median(taken) for taken in times.values())
print(f"{GLOBAL} global tokens and {N} patches, largest difference {difference:.0e}")
print(f"forward and backward: {dense:.3f} s dense and masked, {local:.3f} s local")
print(f"ratio: {dense / local:.2f}x as fast")
