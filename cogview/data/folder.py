# SPDX-License-Identifier: Apache-2.0
"""A user's own folder of images with captions.

A folder holds images and one list of captions, ``captions.tsv`` (``file<TAB>caption`` per line, a file
may have several lines) or ``captions.json`` (``{"file": "caption"}`` or ``{"file": ["one", "two"]}``),
UTF-8, file names relative to the folder.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor

from cogview.data.caption_files import is_text, read_captions
from cogview.data.fingerprint import contents
from cogview.data.image_files import picture_files, read_pixels, to_unit_range
from cogview.files import StrPath, is_file
from cogview.progress import Progress

CACHE_BYTES = 1 << 30  # pictures at training size that are kept in memory
MANY = 20


def listing(entries: list[str]) -> str:
    """The first entries on one line, and how many more there are."""
    more = f"; and {len(entries) - MANY} more" if len(entries) > MANY else ""
    return "; ".join(entries[:MANY]) + more


class FolderPairs:
    """A folder of images with ``captions.tsv`` or ``captions.json``.

    Args:
        skip_bad: leave out files that are not there; :meth:`check` then tells which.
        captions: of each file, in place of the folder's list.
    """

    absent: list[str]

    def __init__(
        self,
        folder: StrPath,
        *,
        skip_bad: bool = False,
        captions: Mapping[str, list[str]] | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not os.path.isdir(self.folder):
            raise FileNotFoundError(
                f'data folder not found: {self.folder} (built in are "digits" and "emoji")'
            )
        self._items = sorted((read_captions(self.folder) if captions is None else captions).items())
        if not self._items:
            raise ValueError(f"{self.folder}: the caption list is empty")
        self._pictures: dict[tuple[int, int], Tensor] = {}  # by index and size, read before
        self.absent = self._leave_out_absent()
        if self.absent and not (skip_bad and self._items):
            raise FileNotFoundError(
                f"{self.folder}: the caption list names files that are not there: {listing(self.absent)}"
            )

    def _leave_out_absent(self) -> list[str]:
        absent = [name for name, _ in self._items if not is_file(self.folder / name)]
        if not absent:
            return []
        files = (path for path in self.folder.rglob("*") if path.is_file())
        present = [path.relative_to(self.folder).as_posix() for path in files]
        near = {_folded(name): name for name in sorted(present)}
        gone = set(absent)
        self._items = [item for item in self._items if item[0] not in gone]
        hints = ((name, near.get(_folded(name))) for name in absent)
        return [f"{name} (did you mean {guess!r}?)" if guess else name for name, guess in hints]

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

    def captions(self, index: int) -> list[str]:
        """The captions listed for the file."""
        return self._items[index][1]

    def name(self, index: int) -> str:
        """The file's name as the caption list has it."""
        return self._items[index][0]

    def origin(self, index: int) -> None:
        """Every file is a picture of its own."""

    def check(self, size: int, *, skip_bad: bool = False, progress: bool = True) -> list[str]:
        """Read every image once. ValueError that lists those which cannot be read.

        With ``skip_bad`` these are left out instead. Returns what was left out and why.
        """
        with (
            Progress(len(self), "check images", unit="image", enabled=progress) as bar,
            ThreadPoolExecutor(os.cpu_count()) as threads,
        ):
            problems = []
            for problem in threads.map(partial(self._problem, size=size), range(len(self))):
                problems.append(problem)
                bar.update()
        bad = [problem for problem in problems if problem]
        if bad and (len(bad) == len(self) or not skip_bad):
            raise ValueError(
                f"{len(bad)} of {len(self)} images in {self.folder} cannot be used; mend them, take them "
                f"off the caption list, or leave them out with --skip-bad: {listing(bad)}"
            )
        if bad:
            self._items = [item for item, problem in zip(self._items, problems, strict=True) if not problem]
            self._pictures.clear()  # Its indices are those of the longer list.
        return [f"{self.folder / name} is not there" for name in self.absent] + bad

    def _problem(self, index: int, size: int) -> str:
        try:
            self.image(index, size)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    def identity(self) -> Iterator[bytes]:
        """Name, size and captions of every file, and what tells contents apart."""
        for name, captions in self._items:
            yield repr((name, (self.folder / name).stat().st_size, captions)).encode(errors="surrogatepass")
        yield from contents([self.folder / name for name, _ in self._items])


def pictures_with(caption: str, folder: StrPath) -> FolderPairs:
    """All pictures of a folder with one caption; a list of captions in it is not looked at.

    Raises what :func:`picture_files` raises, and ValueError for an empty caption.
    """
    if not is_text(caption):
        raise ValueError(f"caption must be a text that is not empty, got {caption!r}")
    names = (path.relative_to(folder).as_posix() for path in picture_files(folder))
    return FolderPairs(folder, captions={name: [caption] for name in names})


def _folded(name: str) -> str:
    """The same for names that differ by composed letters, case or the kind of slash."""
    return unicodedata.normalize("NFC", os.path.normpath(name.replace("\\", "/"))).casefold()
