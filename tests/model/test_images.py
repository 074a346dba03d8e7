# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from PIL import Image

from cogview import images
from cogview.demo.plots import save_picks_plot
from cogview.evaluation.evaluation_plot import save_distance_plot
from cogview.images import grid_size, picture_grid, png_bytes, save_overview, to_picture, undrawn_is_white


def plain(colour, side=8):
    return Image.new("RGB", (side, side), colour)


def test_pixels_are_rounded_and_not_stretched():
    pixels = torch.tensor([0.0, 50.9 / 255, 1.0]).view(3, 1, 1).expand(3, 2, 5)
    picture = to_picture(pixels)
    assert picture.size == (5, 2)
    assert picture.getcolors() == [(10, (0, 51, 255))]


def test_a_grid_goes_row_by_row_on_white(monkeypatch):
    monkeypatch.setattr(images, "MIN_SIDE", 16)
    monkeypatch.setattr(images, "COLUMNS", 2)
    red, green, blue = (plain(colour) for colour in ("red", "lime", "blue"))
    grid = picture_grid([[red, green, blue]])
    assert grid.size == (2 * 20 + 4, 2 * 20 + 4)
    assert [grid.getpixel(at) for at in ((4, 4), (19, 19), (24, 4), (4, 24))] == [
        *((255, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
    ]
    assert [grid.getpixel(at) for at in ((3, 3), (20, 4), (43, 43), (24, 24))] == [(255, 255, 255)] * 4
    each_text_begins_a_line = picture_grid([[red], [green, blue]])
    assert [each_text_begins_a_line.getpixel(at) for at in ((4, 4), (24, 4), (4, 24), (24, 24))] == [
        *((255, 0, 0), (255, 255, 255), (0, 255, 0), (0, 0, 255))
    ]


def test_a_grid_of_many_pictures_is_no_strip():
    assert grid_size([16], 16) == (16 * 68 + 4, 68 + 4)
    assert grid_size([600], 16) == (25 * 68 + 4, 24 * 68 + 4)
    assert grid_size([20, 3], 16) == (16 * 68 + 4, 3 * 68 + 4)


def test_a_small_picture_is_enlarged_by_repeating_pixels():
    halves = Image.fromarray(np.array([[[0] * 3, [255] * 3]] * 2, dtype=np.uint8))
    assert sorted(picture_grid([[halves]]).getcolors()) == [(2048, (0, 0, 0)), (2048, (255, 255, 255))]


def test_a_single_picture_has_no_margin_and_a_large_one_keeps_its_size():
    assert picture_grid([[plain("red")]]).size == (64, 64)
    assert picture_grid([[plain("red", side=100)]]).size == (100, 100)


def test_what_is_not_drawn_yet_is_white():
    codes = torch.tensor([[3, 0, -1, -1]])
    pixels = undrawn_is_white(torch.zeros(1, 3, 4, 4), codes, 2)
    assert pixels[0, :, :2].eq(0).all() and pixels[0, :, 2:].eq(1).all()


def test_a_png_says_what_it_shows(tmp_path):
    (tmp_path / "x.png").write_bytes(png_bytes(plain("red"), {"prompt": "手写数字七", "seed": -(2**70)}))
    with Image.open(tmp_path / "x.png") as read:
        assert read.text == {"prompt": "手写数字七", "seed": str(-(2**70))}


def test_pixels_that_are_no_numbers_are_an_error():
    with pytest.raises(FloatingPointError, match="not finite"):
        to_picture(torch.full((3, 2, 2), torch.nan))


def test_a_png_holds_what_was_saved(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    save_overview(tmp_path / "deep" / "x.png", Image.fromarray(pixels))
    with Image.open(tmp_path / "deep" / "x.png") as read:
        assert read.format == "PNG"
        assert np.array_equal(np.asarray(read), pixels)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.png"]


def test_a_folder_of_any_name_stands_on_a_plot(tmp_path):
    for name in ("a $x^$", "a $\\q$", r"a \$5$", "a \udcff"):
        save_distance_plot(tmp_path / "distance.png", name, "distance", {"0": 1.0, "1": 2.0})
        picks = {"title": {name: {"clip": {"shape": 0.5}}}}
        save_picks_plot(tmp_path / "picks.png", picks)
    assert images.is_overview(tmp_path / "distance.png") and images.is_overview(tmp_path / "picks.png")
