# SPDX-License-Identifier: Apache-2.0
"""Where drawn pictures go: one sheet, a folder with a file for each, a device, or standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from cogview.files import require_folder, require_place, write_bytes
from cogview.images import grid_size, png_bytes, sheet_bytes

LARGEST_SHEET = 1 << 28  # pixels
SHEET = "sheet.png"


class Outlet:
    """The target of ``--out``, looked at before anything is drawn.

    Args:
        out: ``-`` for standard output; a name that ends in .png, or a device or pipe that exists, for one
            sheet of all pictures; an existing folder, or a new name without an ending, for a folder with
            one PNG for each picture and a sheet.
        force: whether files may be replaced.

    Raises:
        ValueError: another ending.
        OSError: a file that exists already, or a place that cannot be written to.
    """

    def __init__(self, out: str, force: bool = False) -> None:
        # What a symbolic link leads to is replaced, not the link.
        path = Path(os.path.realpath(out))
        self.name = out
        self.is_standard_output = out == "-"
        is_plain = os.path.isfile(path) or os.path.isdir(path)
        self.is_stream = self.is_standard_output or (os.path.exists(path) and not is_plain)
        is_folder = os.path.isdir(path) or out.endswith("/") or not (self.is_stream or path.suffix)
        self.folder = path if is_folder else None
        self.path = path
        if self.is_standard_output and sys.__stdout__ is None:
            raise OSError("--out - cannot be written: standard output is closed; name a file")
        if self.is_stream:
            return
        if self.folder is None and path.suffix.lower() != ".png":
            raise ValueError(
                f"--out must be a .png file, a folder (a name without an ending) or - for standard output, "
                f"got {out}"
            )
        if self.folder is not None and not force and os.path.isdir(path) and any(path.glob("*.png")):
            raise FileExistsError(f"{out} has pictures already; --force replaces them, or name another --out")
        if self.folder is None and os.path.lexists(path) and not force:
            raise FileExistsError(f"{out} exists; --force replaces it, or name another --out")
        if self.folder is None:
            require_place(path, out)
        else:
            require_folder(path, out)

    def check_size(self, counts: Sequence[int], side: int) -> None:
        """ValueError if a sheet of so many pictures of each text is too large to be the only outcome."""
        width, height = grid_size(counts, side)
        if self.folder is None and width * height > LARGEST_SHEET:
            raise ValueError(
                f"a sheet of {sum(counts):,} pictures would have {width} x {height} pixels; "
                "draw fewer, or give --out a folder, for one file each"
            )

    def write_picture(self, name: str, picture: Image.Image, about: Mapping[str, object]) -> Path | None:
        """One picture as a file of its own; None unless the outlet is a folder."""
        if self.folder is None:
            return None
        path = self.folder / f"{name}.png"
        write_bytes(path, png_bytes(picture, about))
        return path

    def write_sheet(self, groups: Sequence[Sequence[Image.Image]], about: Mapping[str, object]) -> None:
        """All pictures as one; a folder gets none that would be too large."""
        counts = [len(group) for group in groups if group]
        width, height = grid_size(counts, max(group[0].width for group in groups if group))
        if width * height > LARGEST_SHEET:
            return
        content = sheet_bytes(groups, about, is_beside=self.folder is not None)
        if self.is_standard_output:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        elif self.is_stream:
            # A device or a pipe takes what is written to it; to rename a file over it would remove it.
            try:
                with open(self.path, "wb", buffering=0) as stream:
                    stream.write(content)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.name) from None
        else:
            write_bytes(self.path if self.folder is None else self.folder / SHEET, content)
