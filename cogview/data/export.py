# SPDX-License-Identifier: Apache-2.0
"""Built-in pictures as a folder that people can look at and that training reads."""

from __future__ import annotations

from cogview.data.emoji import EmojiPairs
from cogview.files import StrPath, folder_written_aside, require_new
from cogview.images import png_bytes, to_picture
from cogview.progress import Progress


def write_folder(pairs: EmojiPairs, folder: StrPath, size: int, attribution: str) -> None:
    """Write the pictures as PNG, their captions as ``captions.tsv`` and ``ATTRIBUTION.txt``, all or nothing.

    FileExistsError if there is such a folder, ValueError if there are no pictures.
    """
    require_new(folder)
    if not len(pairs):
        raise ValueError("there are no such pictures, so nothing was written")
    lines = []
    with folder_written_aside(folder) as aside, Progress(len(pairs), "write pictures", unit="image") as bar:
        for index, picture in enumerate(pairs.pictures):
            name = f"{picture.stem}.png"
            (aside / name).write_bytes(png_bytes(to_picture(pairs.image(index, size))))
            lines += [f"{name}\t{caption}" for caption in pairs.captions(index)]
            bar.update()
        (aside / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (aside / "ATTRIBUTION.txt").write_text(attribution + "\n", encoding="utf-8")
