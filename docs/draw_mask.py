# SPDX-License-Identifier: Apache-2.0
"""Draws ``docs/mask.png`` from ``ThreeRegionLayout.dense_mask``: ``python docs/draw_mask.py``.

Left: which keys each query sees. Right: the same keys as a kernel reads them, gathered into the sorted list
of pivots and the window. A block of queries sees a prefix of that list.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from cogview_kernels import ThreeRegionLayout

PATH = Path(__file__).resolve().parent / "mask.png"
T, TEXT, P = 64, 6, 16
BLOCK_SIZE, WINDOW_BLOCKS = 8, 2
MARKED = 5  # the block of queries that is outlined on both sides

HIDDEN, WINDOW, TEXT_PIVOT, RANDOM_PIVOT = 0, 1, 2, 3
COLOURS = ("#eef2f6", "#94a3b8", "#2563eb", "#ea580c")
NAMES = ("not seen", "window", "far: text", "far: random pivots")
INK = "#1e293b"


def layout() -> ThreeRegionLayout:
    text = torch.zeros(1, T, dtype=torch.bool)
    text[:, :TEXT] = True
    generator = torch.Generator().manual_seed(5)
    return ThreeRegionLayout.sample(
        text, P, block_size=BLOCK_SIZE, window_blocks=WINDOW_BLOCKS, generator=generator
    )


def by_position(drawn: ThreeRegionLayout) -> torch.Tensor:
    """``[T, T]``: the region through which query i (row) sees key j (column)."""
    seen = drawn.dense_mask(T)[0]
    key = torch.arange(T)
    far = key[None] // BLOCK_SIZE <= key[:, None] // BLOCK_SIZE - WINDOW_BLOCKS
    region = torch.where(far, torch.where(key < TEXT, TEXT_PIVOT, RANDOM_PIVOT)[None], WINDOW)
    return torch.where(seen, region, HIDDEN)


def gathered(drawn: ThreeRegionLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, P]`` and ``[T, window]``: the far keys by their place in the sorted list, and the window from its
    first block on."""
    regions, query = by_position(drawn), torch.arange(T)
    far = regions[:, drawn.pivots[0].sort().values]
    far = torch.where(far == WINDOW, HIDDEN, far)
    window_start = (query // BLOCK_SIZE - WINDOW_BLOCKS + 1) * BLOCK_SIZE
    keys = window_start[:, None] + torch.arange(WINDOW_BLOCKS * BLOCK_SIZE)
    near = regions.gather(1, keys.clamp(min=0))
    return far, torch.where(keys >= 0, near, HIDDEN)


def fingerprint() -> str:
    """Of all that the drawing shows. The file's metadata keep it, so that a stale drawing is known."""
    drawn = layout()
    shown = torch.cat([by_position(drawn), *gathered(drawn)], 1).to(torch.uint8)
    return hashlib.sha256(bytes(shown.flatten().tolist()) + Path(__file__).read_bytes()).hexdigest()[:16]


def draw(path: Path = PATH) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch, Rectangle

    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans", "text.color": INK})
    drawn = layout()
    far, near = gathered(drawn)
    figure, axes = plt.subplots(
        1, 3, figsize=(10, 5.9), width_ratios=(T, P, WINDOW_BLOCKS * BLOCK_SIZE), layout="constrained"
    )
    colours = ListedColormap(COLOURS)
    for axis, cells in zip(axes, (by_position(drawn), far, near), strict=True):
        axis.pcolormesh(cells.numpy(), cmap=colours, vmin=0, vmax=3, edgecolors="white", linewidth=0.4)
        axis.set_aspect("equal")
        axis.invert_yaxis()
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        outline = Rectangle((0, MARKED * BLOCK_SIZE), cells.shape[1], BLOCK_SIZE)
        outline.set(fill=False, edgecolor=INK, linewidth=1.6, clip_on=False)
        axis.add_patch(outline)
    whole, listed, window = axes
    whole.set_title("Which keys each query sees", fontsize=11, fontweight="bold", loc="left")
    whole.set_xlabel("key position", color=INK)
    whole.set_ylabel("query position", color=INK)
    listed.set_title("The same keys, gathered", fontsize=11, fontweight="bold", loc="left")
    listed.set_xlabel("sorted pivots:\na prefix is seen", color=INK)
    window.set_xlabel("window", color=INK)
    middle = (MARKED + 0.5) * BLOCK_SIZE
    whole.text(T + 1.5, middle, "one block\nof queries", va="center", fontsize=9)
    legend = [Patch(color=COLOURS[i], label=NAMES[i]) for i in (TEXT_PIVOT, RANDOM_PIVOT, WINDOW, HIDDEN)]
    figure.legend(handles=legend, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=170, facecolor="white", metadata={"Software": None, "Source": fingerprint()})


if __name__ == "__main__":
    draw()
