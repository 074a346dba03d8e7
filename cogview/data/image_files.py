# SPDX-License-Identifier: Apache-2.0
"""Reading an image file: the one place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cogview.files import StrPath


def fit_picture(picture: Image.Image, size: int) -> Tensor:
    """A picture as uint8 ``[3, size, size]``: shorter side to ``size``, centre cropped.

    A camera's note on how it was held is heeded. Grayscale and palette pictures become RGB, transparency
    is laid on white.
    """
    picture = ImageOps.exif_transpose(picture).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return pixels.float() / 255


def read_pixels(path: StrPath, size: int) -> Tensor:
    """An image file through :func:`fit_picture`.

    FileNotFoundError if absent, ValueError if it cannot be read as an image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image not found: {path}")
    try:
        with Image.open(path) as file:
            return fit_picture(file, size)
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file.
        raise ValueError(f"{path} cannot be read as an image: {error}") from None


def read_image(path: StrPath, size: int) -> Tensor:
    """:func:`read_pixels` as float32 in [0, 1]."""
    return to_unit_range(read_pixels(path, size))
