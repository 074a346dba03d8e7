# SPDX-License-Identifier: Apache-2.0
"""Tensors as pictures: one PIL image, a grid, a PNG file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def save_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write ``[H, W, 3]`` uint8 as PNG, aside and then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    Image.fromarray(image).save(aside, format="PNG")
    os.replace(aside, path)


def image_grid(images: Tensor, columns: int, *, min_side: int = 64) -> np.ndarray:
    """``[N, 3, S, S]`` in [0, 1] row by row on white, uint8 ``[H, W, 3]``.

    Images smaller than ``min_side`` are enlarged by repeating pixels. Values are not stretched: the same
    code always has the same brightness. A single image gets no margin.
    """
    factor = max(1, min_side // images.shape[-1])
    tiles = (images.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    tiles = tiles.repeat(factor, axis=1).repeat(factor, axis=2)
    if len(tiles) == 1:
        return tiles[0]
    gap, side = 4, tiles.shape[1]
    rows = -(-len(tiles) // columns)
    grid = np.full((rows * (side + gap) + gap, columns * (side + gap) + gap, 3), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = (gap + (side + gap) * place for place in divmod(index, columns))
        grid[top : top + side, left : left + side] = tile
    return grid
