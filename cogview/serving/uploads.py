# SPDX-License-Identifier: Apache-2.0
"""A file that a visitor has dropped, as the small picture that a run reads. The file itself is not kept."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from cogview.data.image_files import pixels_of, read_pixels, to_unit_range
from cogview.images import to_picture

LARGEST_UPLOAD = 20 << 20  # bytes
MOST_PIXELS = 40_000_000
SHOWN_SIDE = 384  # pixels of the square that a page shows
# Pillow also knows kinds of files that it hands to other programs, such as EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class Loaded:
    """A picture as the run sees it, and as a page shows it."""

    pixels: Tensor  # [3, S, S] in [0, 1], the run's size
    shown: Image.Image  # the same square, larger


def load_upload(content: bytes, size: int) -> Loaded:
    """The square in the middle of a picture. ValueError, one line, for what is too large or no picture."""
    if len(content) > LARGEST_UPLOAD:
        raise ValueError(f"the file is larger than {LARGEST_UPLOAD >> 20} MiB; save it smaller")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            count = picture.width * picture.height
    except Image.DecompressionBombError:
        count = 2 * MOST_PIXELS
    except Exception:  # Pillow raises many kinds for a damaged file.
        raise ValueError(
            f"the file cannot be read as a picture; {', '.join(FORMATS[:-1])} and {FORMATS[-1]} are known"
        ) from None
    if count > MOST_PIXELS:
        raise ValueError(
            f"the picture has more than {MOST_PIXELS // 1_000_000} million pixels; scale it down first"
        )
    pixels = [
        to_unit_range(read_pixels(io.BytesIO(content), side, "the file")) for side in (size, SHOWN_SIDE)
    ]
    return Loaded(pixels[0], to_picture(pixels[1]))


def load_drawn(picture: Image.Image, size: int) -> Loaded:
    """A picture that the page itself has drawn."""
    side = max(1, SHOWN_SIDE // picture.width) * picture.width
    return Loaded(pixels_of(picture, size), picture.resize((side, side), Image.Resampling.NEAREST))
