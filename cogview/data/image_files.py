# SPDX-License-Identifier: Apache-2.0
"""Pictures of any kind as pixels: the one place that reads an image file and fits it to a square."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogview.files import StrPath

Picture = StrPath | Image.Image | Tensor  # what the model package takes as one picture


def fit_picture(picture: Image.Image, size: int) -> Tensor:
    """A picture as ``[3, size, size]`` float32 in [0, 1]: shorter side to ``size``, centre cropped.

    Grayscale and palette pictures become RGB, transparency is laid on white.
    """
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    width, height = picture.size
    scale = size / min(width, height)
    resized = (max(size, round(width * scale)), max(size, round(height * scale)))
    if resized != picture.size:
        picture = picture.resize(resized, Image.Resampling.BICUBIC)
    left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def read_image(path: StrPath, size: int) -> Tensor:
    """An image file as :func:`fit_picture` gives it.

    FileNotFoundError if absent, ValueError if it cannot be read as an image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image not found: {path}")
    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    return fit_picture(picture, size)


def pixels_of(picture: Picture, size: int) -> Tensor:
    """A file's path, a PIL picture or a tensor as ``[3, size, size]`` float32 in [0, 1].

    A tensor is ``[3, H, W]``, uint8 or floats in [0, 1]; one of the right size is taken as it is.
    TypeError for anything else, ValueError for another shape.
    """
    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture, size)
    if isinstance(picture, Image.Image):
        return fit_picture(picture, size)
    if not isinstance(picture, Tensor):
        raise TypeError(f"an image must be a path, a PIL picture or a tensor, got {type(picture).__name__}")
    if picture.dim() != 3 or picture.shape[0] != 3 or picture.numel() == 0:
        raise ValueError(f"an image tensor must be [3, H, W], got {list(picture.shape)}")
    pixels = picture.detach().cpu()
    pixels = pixels.float() if pixels.is_floating_point() else pixels.float() / 255
    if pixels.shape[1:] == (size, size):
        return pixels
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return fit_picture(Image.fromarray(values.permute(1, 2, 0).numpy()), size)
