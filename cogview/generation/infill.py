# SPDX-License-Identifier: Apache-2.0
"""Which codes of a picture are kept, and which are drawn anew."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def keep_outside(codes: Tensor, mask: Tensor, grid: int) -> Tensor:
    """The codes ``[grid * grid]`` of a picture, -1 where one is to be drawn anew.

    Args:
        mask: ``[S, S]`` in [0, 1], as large as the picture: a code is drawn anew if any of its pixels is
            above one half (white), and kept if none is.

    ValueError if nothing is to be drawn.
    """
    white = F.max_pool2d(mask[None, None].float(), mask.shape[-1] // grid)[0, 0].flatten() > 0.5
    if not bool(white.any()):
        raise ValueError("mask must have a white part, which is drawn anew; it has none")
    return codes.masked_fill(white.to(codes.device), -1)


def keep_top(codes: Tensor, share: float, grid: int) -> Tensor:
    """The codes ``[grid * grid]`` of a picture, -1 below its upper ``share``, rounded to rows of codes.

    ValueError if ``share`` is not in [0, 1) or leaves nothing to draw.
    """
    if not 0 <= share < 1:
        raise ValueError(f"keep_top must be at least 0 and below 1, got {share}")
    rows = min(round(share * grid), grid - 1)
    kept = codes.clone()
    kept[rows * grid :] = -1
    return kept
