# SPDX-License-Identifier: Apache-2.0
"""A folder of pictures to be compared with others: checked first, then read in batches, and blurred."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from cogview.data.folder import listing
from cogview.data.image_files import pictures_and_overviews, read_pixels, upright_size
from cogview.data.samples import Sample, read_ahead
from cogview.files import StrPath
from cogview.progress import Progress


class PictureFolder:
    """All pictures of a folder, as squares of one size; ``overviews`` of them do not count as pictures.

    Args:
        side: of the squares in pixels, to which pictures are scaled and cropped; None: that of the pictures,
            which must be squares of one size.
        skip_bad: leave out files that cannot be read; ``left_out`` then tells why, one line each.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no picture in it; pictures that cannot be read, all of them listed; pictures of several
            sizes, or that are not square, where ``side`` is None.
    """

    def __init__(
        self, folder: StrPath, *, side: int | None = None, skip_bad: bool = False, progress: bool = True
    ) -> None:
        self.folder = Path(folder)
        paths, self.overviews = pictures_and_overviews(folder)
        found: list[tuple[int, int] | str] = []
        with (
            Progress(len(paths), f"check {self.folder.name}", unit="image", enabled=progress) as bar,
            ThreadPoolExecutor(os.cpu_count()) as threads,
        ):
            for size in threads.map(_size_or_problem, paths):
                found.append(size)
                bar.update()
        self.left_out = [problem for problem in found if isinstance(problem, str)]
        if self.left_out and (len(self.left_out) == len(paths) or not skip_bad):
            raise ValueError(
                f"{len(self.left_out)} of {len(paths)} pictures in {folder} cannot be read; mend them, take "
                f"them away, or leave them out with --skip-bad: {listing(self.left_out)}"
            )
        self.paths = [path for path, size in zip(paths, found, strict=True) if not isinstance(size, str)]
        sizes = Counter(size for size in found if not isinstance(size, str))
        self.side = self._common_side(sizes) if side is None else side

    def _common_side(self, sizes: Counter[tuple[int, int]]) -> int:
        smallest = min(min(size) for size in sizes)
        if len(sizes) > 1:
            (first, many), (second, few) = sizes.most_common(2)
            raise ValueError(
                f"the pictures in {self.folder} must be of one size, got {many} of {first[0]}x{first[1]} and "
                f"{few} of {second[0]}x{second[1]} pixels; --size {smallest} scales and crops all of them"
            )
        width, height = next(iter(sizes))
        if width != height:
            raise ValueError(
                f"the pictures in {self.folder} must be squares, got {width}x{height} pixels; "
                f"--size {smallest} scales and crops all of them"
            )
        return width

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """uint8 ``[n, 3, side, side]``, in the order of the files' names; each batch is read ahead."""
        samples = (Sample(str(path), (), partial(read_pixels, path)) for path in self.paths)
        for part in read_ahead(samples, self.side, batch_size, min(4, os.cpu_count() or 1)):
            problems = [picture for _, picture in part if isinstance(picture, str)]
            if problems:
                raise ValueError(f"changed while it was evaluated: {problems[0]}")
            yield torch.stack([picture for _, picture in part if isinstance(picture, Tensor)])


def _size_or_problem(path: Path) -> tuple[int, int] | str:
    try:
        read_pixels(path, 1)
        return upright_size(path)
    except (ValueError, OSError) as error:
        return str(error)


def blurred(images: Tensor, radius: float) -> Tensor:
    """uint8 ``[N, 3, H, W]`` through Pillow's Gaussian blur of a standard deviation in pixels."""
    if not radius:
        return images
    blur = ImageFilter.GaussianBlur(radius)
    pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()).filter(blur) for image in images)
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
