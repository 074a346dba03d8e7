# SPDX-License-Identifier: Apache-2.0
"""Pictures as PNG files: one image, a grid, a contact sheet, loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from cogview.files import StrPath, written_aside

RIGHT, WRONG = (0.30, 0.60, 0.40), (0.80, 0.20, 0.20)


def save_png(path: StrPath, image: np.ndarray) -> None:
    """Write ``[H, W, 3]`` uint8 as PNG, aside and then renamed."""
    with written_aside(path) as aside:
        Image.fromarray(image).save(aside, format="PNG")


def _save_figure(path: StrPath, figure: Figure) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_png(path, np.asarray(canvas.buffer_rgba())[..., :3].copy())


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


def save_contact_sheet(
    path: StrPath, title: str, labels: Sequence[str], images: Tensor, is_right: Tensor
) -> None:
    """One labelled row of candidates per prompt, best first.

    Args:
        images: ``[R, M, 3, S, S]`` in [0, 1].
        is_right: bool ``[R, M]``; a wrong candidate is framed in red.
    """
    rows, columns, _, side, _ = images.shape
    factor = max(1, 48 // side)
    frame, gap = 3, 3
    cell = side * factor + 2 * frame + gap
    sheet = np.ones((rows * cell, columns * cell, 3))
    tiles = images.permute(0, 1, 3, 4, 2).cpu().numpy().repeat(factor, axis=2).repeat(factor, axis=3)
    for row in range(rows):
        for column in range(columns):
            block = sheet[row * cell : row * cell + cell - gap, column * cell : column * cell + cell - gap]
            block[:] = RIGHT if is_right[row, column] else WRONG
            block[frame:-frame, frame:-frame] = tiles[row, column]
    figure = Figure(figsize=(13, 0.55 * rows + 1.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet, interpolation="nearest", aspect="equal")
    axes.set_yticks([(row + 0.5) * cell for row in range(rows)], labels, fontsize=10)
    axes.set_xticks(
        [(column + 0.5) * cell for column in range(columns)],
        [str(place + 1) for place in range(columns)],
        fontsize=9,
    )
    axes.tick_params(length=0)
    axes.set_xlabel("rank by CapLoss, best first (red frame: the judge reads another digit)")
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11)
    _save_figure(path, figure)


def _running_mean(values: Sequence[float], width: int) -> np.ndarray:
    total = np.cumsum(np.concatenate([[0.0], np.asarray(values, dtype=float)]))
    first = np.maximum(np.arange(1, len(values) + 1) - width, 0)
    last = np.arange(1, len(values) + 1)
    return (total[last] - total[first]) / (last - first)


def save_loss_curves(path: StrPath, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """One panel per title, one labelled curve per entry, over steps, with running means on top."""
    figure = Figure(figsize=(5.5 * len(panels), 3.8), dpi=110, layout="constrained")
    for axes, (title, curves) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True
    ):
        for index, (label, values) in enumerate(curves.items()):
            steps = np.arange(1, len(values) + 1)
            axes.plot(steps, values, color=f"C{index}", alpha=0.25, linewidth=0.8)
            axes.plot(steps, _running_mean(values, 25), color=f"C{index}", linewidth=1.6, label=label)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    _save_figure(path, figure)
