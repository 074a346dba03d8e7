# SPDX-License-Identifier: Apache-2.0
"""A user's own folder of images with captions.

A folder holds images and one list of captions, ``captions.tsv`` (``file<TAB>caption`` per line, a file
may have several lines) or ``captions.json`` (``{"file": "caption"}`` or ``{"file": ["one", "two"]}``),
UTF-8, file names relative to the folder.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor

from cogview.data.image_files import read_pixels, to_unit_range
from cogview.files import StrPath
from cogview.progress import Progress

CACHE_BYTES = 1 << 30  # pictures at training size that are kept in memory
MANY = 20


def _listing(entries: list[str]) -> str:
    more = f"; and {len(entries) - MANY} more" if len(entries) > MANY else ""
    return "; ".join(entries[:MANY]) + more


class FolderPairs:
    """A folder of images with ``captions.tsv`` or ``captions.json``."""

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f'data folder not found: {self.folder} (the built-in data is "digits")')
        table = self._read_captions()
        self._items = sorted(table.items())
        if not self._items:
            raise ValueError(f"{self.folder}: the caption list is empty")
        self._pictures: dict[tuple[int, int], Tensor] = {}  # by index and size, read before
        absent = [name for name, _ in self._items if not (self.folder / name).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{self.folder}: the caption list names files that are not there: {_listing(absent)}"
            )

    def _read_captions(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        tsv, jsonfile = self.folder / "captions.tsv", self.folder / "captions.json"
        if tsv.is_file():
            for number, line in enumerate(tsv.read_text(encoding="utf-8-sig").splitlines(), start=1):
                if not line.strip():
                    continue
                name, tab, caption = line.partition("\t")
                if not tab or not caption.strip():
                    raise ValueError(f"{tsv}, line {number}: expected file<TAB>caption, got {line!r}")
                table.setdefault(name.strip(), []).append(caption.strip())
        elif jsonfile.is_file():
            try:
                content = json.loads(jsonfile.read_text(encoding="utf-8-sig"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{jsonfile} is not valid JSON: {error}") from None
            if not isinstance(content, dict):
                raise ValueError(
                    f'{jsonfile} must hold {{"file": "caption"}}, got a {type(content).__name__}'
                )
            for name, entry in content.items():
                captions = [entry] if isinstance(entry, str) else entry
                is_list = isinstance(captions, list) and captions
                if not is_list or not all(isinstance(text, str) and text.strip() for text in captions):
                    raise ValueError(
                        f"{jsonfile}: {name} must have a caption or a list of captions, got {entry!r}"
                    )
                table[name] = [text.strip() for text in captions]
        else:
            raise FileNotFoundError(
                f"{self.folder} has no captions.tsv (file<TAB>caption per line) and no captions.json"
            )
        return table

    def __len__(self) -> int:
        return len(self._items)

    def image(self, index: int, size: int) -> Tensor:
        """``[3, size, size]`` in [0, 1]."""
        pixels = self._pictures.get((index, size))
        if pixels is None:
            pixels = read_pixels(self.folder / self._items[index][0], size)
            if pixels.numel() * (len(self._pictures) + 1) <= CACHE_BYTES:
                self._pictures[index, size] = pixels
        return to_unit_range(pixels)

    def check(self, size: int, *, progress: bool = True) -> None:
        """Read every image once. ValueError that lists those which cannot be read."""
        bad = []
        with (
            Progress(len(self), "check images", unit="image", enabled=progress) as bar,
            ThreadPoolExecutor(os.cpu_count()) as threads,
        ):
            for problem in threads.map(partial(self._problem, size=size), range(len(self))):
                bad += [problem] if problem else []
                bar.update()
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(self)} images in {self.folder} cannot be used; mend them or take them "
                f"off the caption list: {_listing(bad)}"
            )

    def _problem(self, index: int, size: int) -> str:
        try:
            self.image(index, size)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    def captions(self, index: int) -> list[str]:
        """The captions listed for the file."""
        return self._items[index][1]
