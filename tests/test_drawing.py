# SPDX-License-Identifier: Apache-2.0
"""docs/mask.png shows what ``dense_mask`` says today, and what it claims about prefixes is so."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("draw_mask", DOCS / "draw_mask.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawing_is_up_to_date(drawing):
    image = pytest.importorskip("PIL.Image")
    with image.open(DOCS / "mask.png") as picture:
        assert picture.info["Source"] == drawing.fingerprint(), "run `python docs/draw_mask.py`"


def test_both_sides_show_the_same_keys(drawing):
    layout = drawing.layout()
    regions, (far, near) = drawing.by_position(layout), drawing.gathered(layout)
    assert torch.equal(regions != drawing.HIDDEN, layout.dense_mask(drawing.T)[0])
    for region in (drawing.WINDOW, drawing.TEXT_PIVOT, drawing.RANDOM_PIVOT):
        both = (far == region).sum(1) + (near == region).sum(1)
        assert torch.equal((regions == region).sum(1), both) and both.sum() > 0


def test_a_block_of_queries_sees_a_prefix_of_the_sorted_pivots(drawing):
    far, _ = drawing.gathered(drawing.layout())
    seen = (far != drawing.HIDDEN).int()
    assert torch.equal(seen, seen.cummin(1).values)
    blocks = seen.unflatten(0, (-1, drawing.BLOCK_SIZE))
    assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))


def test_the_drawing_can_be_drawn_again(drawing, tmp_path):
    pytest.importorskip("matplotlib")
    drawing.draw(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 10_000
