# SPDX-License-Identifier: Apache-2.0
import numpy as np
import torch
from PIL import Image

from cogview.images import picture_grid, save_png, to_picture


def plain(colour, side=8):
    return Image.new("RGB", (side, side), colour)


def test_pixels_are_rounded_and_not_stretched():
    pixels = torch.tensor([0.0, 50.9 / 255, 1.0]).view(3, 1, 1).expand(3, 2, 5)
    picture = to_picture(pixels)
    assert picture.size == (5, 2)
    assert picture.getcolors() == [(10, (0, 51, 255))]


def test_a_grid_goes_row_by_row_on_white():
    red, green, blue = (plain(colour) for colour in ("red", "lime", "blue"))
    grid = picture_grid([red, green, blue], columns=2, min_side=16)
    assert grid.size == (2 * 20 + 4, 2 * 20 + 4)
    assert [grid.getpixel(at) for at in ((4, 4), (19, 19), (24, 4), (4, 24))] == [
        *((255, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
    ]
    assert [grid.getpixel(at) for at in ((3, 3), (20, 4), (43, 43), (24, 24))] == [(255, 255, 255)] * 4


def test_a_small_picture_is_enlarged_by_repeating_pixels():
    halves = Image.fromarray(np.array([[[0] * 3, [255] * 3]] * 2, dtype=np.uint8))
    colours = picture_grid([halves], columns=1).getcolors()
    assert sorted(colours) == [(2048, (0, 0, 0)), (2048, (255, 255, 255))]


def test_a_single_picture_has_no_margin_and_a_large_one_keeps_its_size():
    assert picture_grid([plain("red")], columns=1).size == (64, 64)
    assert picture_grid([plain("red", side=100)], columns=1).size == (100, 100)


def test_a_png_holds_what_was_saved(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    save_png(tmp_path / "deep" / "x.png", Image.fromarray(pixels))
    with Image.open(tmp_path / "deep" / "x.png") as read:
        assert read.format == "PNG"
        assert np.array_equal(np.asarray(read), pixels)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.png"]
