# SPDX-License-Identifier: Apache-2.0
"""CogView2's local attention, from the published semantics of its kernels ``similar`` and ``weighting``.

Each query has the scores of all slots of its window, -10000 where a slot lies outside the image, and the
values of these slots. Scores of several windows and of text are concatenated under one softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Slots = tuple[Tensor, Tensor]  # scores [B, H, queries, slots], values [B, H, queries or 1, slots, D]


def window_slots(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], kernel_size: tuple[int, int],
    query_scale: int = 1, causal: bool = False,
) -> Slots:  # fmt: skip
    slots = kernel_size[0] * kernel_size[1]
    padding = (kernel_size[0] // 2, kernel_size[1] // 2)

    def unfolded(x: Tensor) -> Tensor:  # [B, H, keys, D] to [B, H, queries, slots, D]
        B, H, _, D = x.shape
        image = x.transpose(2, 3).reshape(B * H, D, *grid)
        cells = F.unfold(image, kernel_size, padding=padding).view(B * H, D * slots, *grid)
        fine = cells.repeat_interleave(query_scale, 2).repeat_interleave(query_scale, 3)
        return fine.view(B, H, D, slots, -1).permute(0, 1, 4, 3, 2)

    outside = unfolded(torch.ones_like(k))[..., 0] == 0
    scores, values = (unfolded(k) @ q[..., None])[..., 0].masked_fill(outside, -10000), unfolded(v)
    if causal:
        scores, values = scores[..., : slots // 2 + 1], values[..., : slots // 2 + 1, :]
    return scores, values


def text_slots(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Slots:
    scores = q @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -10000)
    return scores, v[:, :, None]


def joint_attention(*groups: Slots) -> Tensor:
    weights = torch.cat([scores for scores, _ in groups], 3).softmax(3)
    parts = weights.split([scores.shape[3] for scores, _ in groups], 3)
    return sum(
        (part[..., None, :] @ values)[..., 0, :] for part, (_, values) in zip(parts, groups, strict=True)
    )
