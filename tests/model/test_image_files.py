# SPDX-License-Identifier: Apache-2.0
import resource

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.commands.outlet import Outlet
from cogview.data.image_files import picture_files, pixels_of, read_image, upright_size
from cogview.images import is_overview, png_bytes, save_overview


def save(path, array):
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def test_images_of_every_kind_become_rgb(tmp_path):
    save(tmp_path / "gray.png", np.full((16, 16), 51))
    torch.testing.assert_close(read_image(tmp_path / "gray.png", 8), torch.full((3, 8, 8), 0.2))
    # Half-transparent black on white.
    save(tmp_path / "alpha.png", np.dstack([np.zeros((8, 8, 3)), np.full((8, 8), 51)]))
    torch.testing.assert_close(read_image(tmp_path / "alpha.png", 8), torch.full((3, 8, 8), 0.8))


def test_a_photo_taken_sideways_stands_upright(tmp_path):
    picture = Image.fromarray(np.full((8, 8, 3), 255, dtype=np.uint8))
    picture.paste((0, 0, 0), (0, 0, 8, 4))  # dark above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png", 8)
    assert torch.all(image[..., :4] == 1) and torch.all(image[..., 4:] == 0)
    Image.new("L", (6, 4)).save(tmp_path / "wide.png", exif=exif)
    assert upright_size(tmp_path / "wide.png") == upright_size(torch.zeros(3, 6, 4)) == (4, 6)
    assert upright_size(Image.new("L", (6, 4))) == (6, 4)


def test_the_centre_is_kept(tmp_path):
    wide = np.zeros((8, 24, 3))
    wide[:, 8:16] = 255
    save(tmp_path / "wide.png", wide)
    assert torch.all(read_image(tmp_path / "wide.png", 8) == 1)


def test_a_missing_or_a_bad_image_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="image not found"):
        read_image(tmp_path / "absent.png", 8)
    (tmp_path / "bad.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        read_image(tmp_path / "bad.png", 8)
    save(tmp_path / "cut.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3)))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as an image"):
        read_image(tmp_path / "cut.png", 8)


RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)


def wide(values, mode="I;16"):
    return Image.fromarray(values) if mode == "I;16" else Image.fromarray(values.astype(np.int32))


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("grey16.png", wide(RAMP)),
        ("grey16.tif", wide(RAMP)),
        ("grey32.tif", wide(RAMP, "I")),
        ("float.tif", Image.fromarray(RAMP.astype(np.float32) / 65535)),
        ("grey8.png", Image.fromarray((RAMP / 257).round().astype(np.uint8))),
    ],
)
def test_a_grey_ramp_has_the_same_brightness_in_any_depth(tmp_path, name, picture):
    picture.save(tmp_path / name)
    expected = torch.linspace(0, 1, 64).view(8, 8).expand(3, 8, 8)
    torch.testing.assert_close(read_image(tmp_path / name, 8), expected, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("values", [np.full((8, 8), 200.0), np.full((8, 8), np.nan), np.full((8, 8), -1)])
def test_pixels_of_another_range_are_an_error_that_says_so(tmp_path, values):
    Image.fromarray(values.astype(np.int32 if values.dtype == int else np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif .*its pixels are not .* save it as 8-bit RGB"):
        read_image(tmp_path / "x.tif", 8)


def test_cmyk_palette_and_animation(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    clear = Image.new("P", (8, 8), 0)
    clear.putpalette([0, 0, 255])
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    red.convert("P").save(tmp_path / "palette.png")
    clear.save(tmp_path / "clear.png", transparency=0)
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    pure = torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 8, 8)
    for name in ("cmyk.jpg", "palette.png", "moving.gif"):
        torch.testing.assert_close(read_image(tmp_path / name, 8), pure, atol=0.02, rtol=0)
    assert torch.all(read_image(tmp_path / "clear.png", 8) == 1)


def test_a_long_strip_costs_no_more_than_itself(tmp_path):
    """Scaled before it is cropped, 1 x 20,000 pixels at size 256 would be 256 x 5,120,000."""
    Image.new("RGB", (1, 20_000), "white").save(tmp_path / "strip.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert torch.all(read_image(tmp_path / "strip.png", 256) == 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_more_pixels_than_anyone_draws_are_one_clear_error(tmp_path, monkeypatch):
    Image.new("1", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png .*it has more than 2000 pixels; scale it down"):
        read_image(tmp_path / "bomb.png", 8)


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(
        ValueError, match=r"empty\.jpg cannot be read as an image: it is empty, damaged or of a"
    ):
        read_image(tmp_path / "empty.jpg", 8)
    save(tmp_path / "cut.jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3)))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.jpg .* cut short or damaged .*copy it again"):
        read_image(tmp_path / "cut.jpg", 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_note_of_the_camera_spoils_no_picture(tmp_path):
    Image.new("RGB", (8, 8), "white").save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert torch.all(read_image(tmp_path / "x.jpg", 8) == 1)


def test_tensors_of_another_range_or_kind_are_refused():
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 0\.\.255"):
        pixels_of(torch.linspace(0, 255, 3 * 64).view(3, 8, 8), 8)
    with pytest.raises(TypeError, match=r"uint8 or floats, got torch\.int32"):
        pixels_of(torch.zeros(3, 8, 8, dtype=torch.int32), 8)
    with pytest.raises(ValueError, match="an image tensor must be a tensor with values, got one on the meta"):
        pixels_of(torch.zeros(3, 8, 8, device="meta"), 8)
    with pytest.raises(ValueError, match=r"an image tensor must be a dense tensor, got one of torch\.sparse"):
        pixels_of(torch.zeros(3, 8, 8).to_sparse(), 8)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_picture_of_no_pixels_is_refused(size):
    said = f"an image must have a pixel at least, got {size[0]} x {size[1]} of them"
    with pytest.raises(ValueError, match=said):
        pixels_of(Image.new("RGB", size), 8)


def test_what_cogview_wrote_as_a_sheet_is_no_picture_of_a_folder_and_what_is_only_called_so_is_one(tmp_path):
    picture, about = Image.new("RGB", (16, 16), "red"), {"prompt": "a tiger", "seed": 0}
    outlet = Outlet(f"{tmp_path}/drawn")
    drawn = [outlet.write_picture(f"{n:04d}", picture, {**about, "candidate": n}) for n in range(2)]
    outlet.write_sheet([[picture, picture]], about)
    assert picture_files(tmp_path / "drawn") == drawn
    (tmp_path / "drawn" / "sheet.png").rename(tmp_path / "drawn" / "an overview.png")
    save_overview(tmp_path / "drawn" / "plot.png", picture)
    (tmp_path / "drawn" / "deep").mkdir()
    # As they were written before there was the note.
    (tmp_path / "drawn" / "deep" / "sheet.png").write_bytes(png_bytes(picture, about))
    assert picture_files(tmp_path / "drawn") == drawn

    own = tmp_path / "drawn" / "sheet.png"
    for notes in ({}, {"prompt": "mine"}, {**about, "candidate": 0}):
        own.write_bytes(png_bytes(picture, notes))
        assert picture_files(tmp_path / "drawn") == [*drawn, own]
    own.write_text("damaged")  # Whoever reads it says so.
    assert picture_files(tmp_path / "drawn") == [*drawn, own]


def test_a_single_picture_is_no_sheet_and_a_folder_of_sheets_alone_keeps_them(tmp_path):
    picture, about = Image.new("RGB", (16, 16), "red"), {"prompt": "a tiger", "seed": 0}
    Outlet(f"{tmp_path}/sheet.png").write_sheet([[picture]], about)
    assert not is_overview(tmp_path / "sheet.png")
    for name in ("a.png", "b.png"):
        Outlet(f"{tmp_path}/sheets/{name}").write_sheet([[picture, picture]], about)
        assert is_overview(tmp_path / "sheets" / name)
    assert len(picture_files(tmp_path / "sheets")) == 2
    assert picture_files(tmp_path) == [tmp_path / "sheet.png"]
