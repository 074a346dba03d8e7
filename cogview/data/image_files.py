# SPDX-License-Identifier: Apache-2.0
"""Pictures of any kind as pixels: the one place that reads an image file and fits it to a square."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cogview.files import StrPath

Picture = StrPath | Image.Image | Tensor  # what the model package takes as one picture


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


def pixels_of(picture: Picture, size: int) -> Tensor:
    """A file's path, a PIL picture or a tensor as ``[3, size, size]`` float32 in [0, 1].

    A tensor is ``[3, H, W]``, uint8 or floats in [0, 1]; one of the right size is taken as it is.
    TypeError for anything else, ValueError for another shape.
    """
    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture, size)
    if isinstance(picture, Image.Image):
        return to_unit_range(fit_picture(picture, size))
    if not isinstance(picture, Tensor):
        raise TypeError(f"an image must be a path, a PIL picture or a tensor, got {type(picture).__name__}")
    if picture.dim() != 3 or picture.shape[0] != 3 or picture.numel() == 0:
        raise ValueError(f"an image tensor must be [3, H, W], got {list(picture.shape)}")
    pixels = picture.detach().cpu()
    pixels = pixels.float() if pixels.is_floating_point() else to_unit_range(pixels)
    if pixels.shape[1:] == (size, size):
        return pixels
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return to_unit_range(fit_picture(Image.fromarray(values.permute(1, 2, 0).numpy()), size))
