# SPDX-License-Identifier: Apache-2.0
"""Pixels as pictures: one PIL image, a grid of them, a figure, a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from cogview.files import StrPath, written_aside


def to_picture(pixels: Tensor) -> Image.Image:
    """``[3, H, W]`` in [0, 1] as an RGB picture.

    Values are not stretched: the same code always has the same brightness.
    """
    values = (pixels.permute(1, 2, 0).float().cpu().numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(values)


def picture_grid(pictures: Sequence[Image.Image], columns: int, *, min_side: int = 64) -> Image.Image:
    """Square pictures of one size row by row on white.

    Pictures smaller than ``min_side`` are enlarged by repeating pixels. A single one gets no margin.
    """
    side = pictures[0].width * max(1, min_side // pictures[0].width)
    tiles = [picture.resize((side, side), Image.Resampling.NEAREST) for picture in pictures]
    if len(tiles) == 1:
        return tiles[0]
    gap = 4
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), "white")
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        grid.paste(tile, (gap + (side + gap) * column, gap + (side + gap) * row))
    return grid


def save_png(path: StrPath, picture: Image.Image) -> None:
    """Write a picture as PNG, aside and then renamed."""
    with written_aside(path) as aside:
        picture.save(aside, format="PNG")


def save_figure(path: StrPath, figure: Any) -> None:
    """Write a matplotlib figure as PNG, aside and then renamed, on a machine without a display too."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_png(path, Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
