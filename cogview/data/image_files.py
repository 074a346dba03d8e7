# SPDX-License-Identifier: Apache-2.0
"""Pictures of any kind as pixels: the one place that reads an image file and fits it to a square."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from cogview.device import require_values
from cogview.files import StrPath, is_file
from cogview.images import is_overview

Picture = StrPath | Image.Image | Tensor  # what the model package takes as one picture
WIDEST_FLOATS = (
    -0.5,
    1.5,
)  # A picture scaled by a cubic filter overshoots a little; one in 0..255 is no such.


def fit_picture(picture: Image.Image, size: int) -> Tensor:
    """A picture as uint8 ``[3, size, size]``: shorter side to ``size``, centre cropped.

    A camera's note on how it was held is heeded, and an animation gives its current frame. Grayscale, palette
    and CMYK become RGB, transparency is laid on white. 16 bits are scaled from 0..65535, floats from [0, 1].

    ValueError for a picture without a pixel, for floats or wide integers of another range, and for a kind of
    colour that is not known.
    """
    with contextlib.suppress(Exception):  # A damaged note is no damaged picture.
        picture = ImageOps.exif_transpose(picture)
    # Cropped before all else: what is done to a strip must not cost what a square of its length would.
    side = min(picture.size)
    if side == 0:
        raise ValueError(
            f"an image must have a pixel at least, got {picture.width} x {picture.height} of them"
        )
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = _eight_bits(picture.crop((left, top, left + side, top + side)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Wide grayscale as 8 bits, which Pillow's own conversion would clip; other pictures as they are."""
    if picture.mode in ("La", "RGBa"):  # Premultiplied by their transparency.
        return picture.convert(picture.mode.upper())
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture).astype(np.float64)
    low, high = values.min(), values.max()
    full = 1 if picture.mode == "F" else 65535
    if not (low >= 0 and high <= full):  # Holds for NaN, too.
        kind = "floats in [0, 1]" if full == 1 else "integers of 16 bits"
        raise ValueError(
            f"its pixels are not {kind} but reach from {low:g} to {high:g}; save it as 8-bit RGB"
        )
    return Image.fromarray((values * (255 / full)).round().astype(np.uint8))


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return pixels.float() / 255


def require_image_file(path: StrPath) -> None:
    """FileNotFoundError, or IsADirectoryError for a folder, which says what to name instead."""
    if is_file(path):
        return
    if os.path.isdir(path):
        raise IsADirectoryError(f"image must be a file, got the folder {path}; name the pictures in it")
    raise FileNotFoundError(f"image not found: {path}")


def read_pixels(file: StrPath | BinaryIO, size: int, name: str = "") -> Tensor:
    """An image file, by its path or opened as ``name``, through :func:`fit_picture`.

    FileNotFoundError if absent, IsADirectoryError for a folder, ValueError that names it if it cannot be
    read as an image.
    """
    if isinstance(file, (str, os.PathLike)):
        name = os.fspath(file)
        require_image_file(name)
    try:
        with Image.open(file) as picture:
            return fit_picture(picture, size)
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file.
        raise ValueError(f"{name} cannot be read as an image: {_reason(error)}") from None


def without_overviews(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The pictures among some files, and the sheets and plots that ``cogview`` wrote beside them.

    A sheet that lies in no folder of other pictures stands for itself: then it is all that there is to see.
    """
    overviews = [path for path in paths if is_overview(path)]
    if len(overviews) == len(paths):
        return list(paths), []
    left_out = set(overviews)
    return [path for path in paths if path not in left_out], overviews


def picture_files(folder: StrPath) -> list[Path]:
    """The files in a folder and in the folders in it whose names end as those of pictures do, sorted.

    Hidden files are left out, and so is what :func:`without_overviews` leaves out. FileNotFoundError if there
    is no such folder, ValueError if it has no pictures.
    """
    return pictures_and_overviews(folder)[0]


def pictures_and_overviews(folder: StrPath) -> tuple[list[Path], list[Path]]:
    """:func:`picture_files`, and the sheets and plots among them that do not count."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of pictures not found: {folder}")
    endings = Image.registered_extensions()
    found = (path for path in folder.rglob("*") if path.suffix.lower() in endings)
    paths = sorted(path for path in found if not path.name.startswith(".") and path.is_file())
    if not paths:
        raise ValueError(f"{folder} has no pictures: no file in it ends with .png, .jpg or the like")
    return without_overviews(paths)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is empty, damaged or of a kind that Pillow does not know"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; scale it down"
    if isinstance(error, (OSError, SyntaxError)):
        return f"it is cut short or damaged ({error}); copy it again"
    return str(error)


def read_image(path: StrPath, size: int) -> Tensor:
    """:func:`read_pixels` as float32 in [0, 1]."""
    return to_unit_range(read_pixels(path, size))


def upright_size(picture: Picture) -> tuple[int, int]:
    """Width and height of what :func:`pixels_of` takes, turned as a camera's note says."""
    if isinstance(picture, Tensor):
        return picture.shape[-1], picture.shape[-2]
    if not isinstance(picture, Image.Image):
        with Image.open(picture) as opened:
            return upright_size(opened)
    orientation = 1
    with contextlib.suppress(Exception):  # A damaged note is no damaged picture.
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    is_on_its_side = orientation in (5, 6, 7, 8)
    return picture.size[::-1] if is_on_its_side else picture.size


def pixels_of(picture: Picture, size: int) -> Tensor:
    """A file's path, a PIL picture or a tensor as ``[3, size, size]`` float32 in [0, 1].

    A tensor is ``[3, H, W]``, uint8 or floats in [0, 1]; one of the right size is taken as it is.
    TypeError for anything else, ValueError for another shape, floats of another range or no values at all.
    """
    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture, size)
    if isinstance(picture, Image.Image):
        return to_unit_range(fit_picture(picture, size))
    if not isinstance(picture, Tensor):
        raise TypeError(f"an image must be a path, a PIL picture or a tensor, got {type(picture).__name__}")
    require_values(picture, "an image tensor")
    if picture.dim() != 3 or picture.shape[0] != 3 or picture.numel() == 0:
        raise ValueError(f"an image tensor must be [3, H, W], got {list(picture.shape)}")
    pixels = picture.detach().cpu()
    if pixels.is_floating_point():
        pixels = pixels.float()
        low, high = pixels.min().item(), pixels.max().item()
        if not WIDEST_FLOATS[0] <= low <= high <= WIDEST_FLOATS[1]:
            raise ValueError(f"an image tensor of floats must be in [0, 1], got {low:g}..{high:g}")
    elif pixels.dtype == torch.uint8:
        pixels = to_unit_range(pixels)
    else:
        raise TypeError(f"an image tensor must be uint8 or floats, got {pixels.dtype}; convert it")
    if pixels.shape[1:] == (size, size):
        return pixels
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return to_unit_range(fit_picture(Image.fromarray(values.permute(1, 2, 0).numpy()), size))
