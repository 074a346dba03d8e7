# SPDX-License-Identifier: Apache-2.0
"""How much of the causal triangle each method must compute: the reason why gathering wins.

``ThreeRegionLayout.plan`` counts the tiles for one sample that is drawn with a fixed seed; nothing is timed.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from benchmarks.shapes import ATTENTION, AttentionShape, Regions
from cogview_kernels import ThreeRegionLayout

# CogView's defaults on its short training sequence: here dense attention must win.
SHORT = AttentionShape("cogview, 6 x 128", B=1, H=1, T=1088, D=64, regions=Regions(128, 6, 256))


def touched_by_a_block_mask(layout: ThreeRegionLayout, T: int) -> int:
    """Tiles of the causal triangle that hold at least one visible pair."""
    blocks = -(-T // layout.block_size)
    has_pivot = torch.zeros(blocks, dtype=torch.bool)
    has_pivot[layout.pivots[layout.pivots >= 0] // layout.block_size] = True
    row, column = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
    return int(((column <= row) & ((column > row - layout.window_blocks) | has_pivot)).sum())


@lru_cache
def table() -> list[dict[str, float | str | int]]:
    rows = []
    for shape in (*ATTENTION.gpu, SHORT):
        generator = torch.Generator().manual_seed(0)
        layout = shape.regions.sample(1, shape.T, torch.device("cpu"), generator)
        plan = layout.plan(shape.T)
        rows.append(
            {
                "shape": shape.name,
                "sizes": f"T={shape.T}, {shape.regions}",
                "visible_pairs": plan.keys_per_query / plan.dense_keys_per_query,
                "causal_tiles": plan.dense_tiles,
                "block_mask_tiles": touched_by_a_block_mask(layout, shape.T),
                "gathered_tiles": plan.gathered_tiles,
                "predicted_gain": plan.predicted_gain,
            }
        )
    return rows


def markdown() -> str:
    lines = [
        "A tile is a block of queries by a block of keys. `layout.plan()` counts how many of them must be",
        "computed for one drawn sample: densely, with a block mask, and with the keys gathered.",
        "The gain over dense causal attention is predicted from these counts.",
        "",
        "| shape | visible / causal pairs | tiles, dense | block mask | gathered | predicted gain |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in table():
        lines.append(
            f"| {row['shape']}: {row['sizes']} | {row['visible_pairs']:.2f} | {row['causal_tiles']} | "
            f"{row['block_mask_tiles']} | {row['gathered_tiles']:.0f} | {row['predicted_gain']:.2f}x |"
        )
    return "\n".join(lines)
