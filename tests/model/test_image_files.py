# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from PIL import Image

from cogview.data.image_files import read_image


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
