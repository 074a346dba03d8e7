# SPDX-License-Identifier: Apache-2.0
"""Pixels as pictures: one PIL image, a grid of them, a figure, a PNG file."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cogview.files import StrPath, write_bytes

GAP = 4  # pixels between the pictures of a grid
MIN_SIDE = 64  # smaller pictures are enlarged in a grid, by repeating pixels
COLUMNS = 16  # of a grid, at least, where there are so many pictures of a text
_NOTE = "cogview"  # in a PNG file: what it is
_OVERVIEW = "overview"  # shows other pictures, or figures, and is no picture of a set itself
_PICTURE = "picture"


def to_picture(pixels: Tensor) -> Image.Image:
    """``[3, H, W]`` in [0, 1] as an RGB picture.

    Values are not stretched: the same code always has the same brightness. FloatingPointError for numbers
    that are not finite.
    """
    if not bool(pixels.isfinite().all()):
        raise FloatingPointError("a picture has pixels that are not finite: the image tokenizer is damaged")
    values = (pixels.permute(1, 2, 0).float().cpu().numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(values)


def undrawn_is_white(pixels: Tensor, codes: Tensor, grid: int) -> Tensor:
    """Pictures ``[N, 3, S, S]``, white where their codes ``[N, grid * grid]`` are not drawn yet (-1)."""
    cell = pixels.shape[-1] // grid
    undrawn = (codes < 0).view(-1, 1, grid, grid).to(pixels.device)
    undrawn = undrawn.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)
    return pixels.masked_fill(undrawn, 1.0)


def columns_for(num: int) -> int:
    """Columns of a grid of ``num`` pictures of each text: one row up to 16, then nearly a square."""
    return min(num, max(COLUMNS, math.ceil(math.sqrt(num))))


def grid_size(rows: Sequence[int], side: int) -> tuple[int, int]:
    """Width and height in pixels of a :func:`picture_grid` of so many pictures in each group."""
    columns, side = columns_for(max(rows)), _shown_side(side)
    lines = sum(-(-count // columns) for count in rows)
    return columns * (side + GAP) + GAP, lines * (side + GAP) + GAP


def picture_grid(groups: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Square pictures of one size on white, each group in rows of its own.

    Small pictures are enlarged by repeating pixels. A single one gets no margin.
    """
    groups = [group for group in groups if group]
    side = _shown_side(groups[0][0].width)
    tiles = [
        [picture.resize((side, side), Image.Resampling.NEAREST) for picture in group] for group in groups
    ]
    if len(tiles) == len(tiles[0]) == 1:
        return tiles[0][0]
    counts = [len(group) for group in groups]
    columns = columns_for(max(counts))
    grid = Image.new("RGB", grid_size(counts, side), "white")
    line = 0
    for group in tiles:
        for index, tile in enumerate(group):
            row, column = divmod(index, columns)
            grid.paste(tile, (GAP + (side + GAP) * column, GAP + (side + GAP) * (line + row)))
        line += -(-len(group) // columns)
    return grid


def _shown_side(side: int) -> int:
    return side * max(1, MIN_SIDE // side)


def png_bytes(picture: Image.Image, about: Mapping[str, object] | None = None) -> bytes:
    """A picture as a PNG file, with ``about`` as its text fields (UTF-8)."""
    fields = PngInfo()
    for name, value in (about or {}).items():
        fields.add_itxt(name, str(value))
    content = io.BytesIO()
    picture.save(content, format="PNG", pnginfo=fields)
    return content.getvalue()


def sheet_bytes(
    groups: Sequence[Sequence[Image.Image]], about: Mapping[str, object], *, is_beside: bool = False
) -> bytes:
    """A :func:`picture_grid` as a PNG file, which :func:`is_overview` knows.

    A single picture is none, unless it has a file of its own beside the sheet.
    """
    is_overview = is_beside or sum(map(len, groups)) > 1
    return png_bytes(picture_grid(groups), {_NOTE: _OVERVIEW if is_overview else _PICTURE, **about})


def is_overview(path: StrPath) -> bool:
    """Whether a file is a sheet or a plot that this package wrote, by what is noted in it.

    A file that cannot be read is none: whoever reads it as a picture says what is wrong with it.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        return False
    try:
        with Image.open(path) as picture:
            notes = dict(picture.info)
    except Exception:  # Pillow raises many kinds for a damaged file.
        return False
    if _NOTE in notes:
        return bool(notes[_NOTE] == _OVERVIEW)
    # Sheets of before there was the note have the text and the seed of their pictures, but no number.
    return path.name == "sheet.png" and {"prompt", "seed"} <= notes.keys() and "candidate" not in notes


def save_overview(path: StrPath, picture: Image.Image) -> None:
    """Write a sheet or a plot as PNG, aside and then renamed."""
    write_bytes(path, png_bytes(picture, {_NOTE: _OVERVIEW}))


def figure_words(words: str) -> str:
    """Names for a matplotlib figure, which would read a formula between dollars and takes UTF-8 alone."""
    return words.replace("$", r"\$").encode(errors="replace").decode()


def save_figure(path: StrPath, figure: Any) -> None:
    """Write a matplotlib figure as PNG, aside and then renamed, on a machine without a display too."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_overview(path, Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
