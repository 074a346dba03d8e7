# SPDX-License-Identifier: Apache-2.0
"""The caption list of a folder of images, ``captions.tsv`` or ``captions.json``, as one table."""

from __future__ import annotations

import codecs
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CAPTION_LISTS = ("captions.tsv", "captions.json")
# Longest first: the mark of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LINE_END = re.compile(r"\r\n|\n|\r")  # str.splitlines also cuts at U+2028, U+0085, VT and FF


def read_captions(folder: Path) -> dict[str, list[str]]:
    """The captions of each file that the folder's list names, in the order of the list.

    FileNotFoundError if there is no list, ValueError that names the file and what is wrong in it.
    """
    tsv, jsonfile = (folder / name for name in CAPTION_LISTS)
    if tsv.is_file():
        return _from_tsv(tsv)
    if jsonfile.is_file():
        return _from_json(jsonfile)
    raise FileNotFoundError(f"{folder} has no captions.tsv (file<TAB>caption per line) and no captions.json")


def _from_tsv(path: Path) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for number, line in enumerate(LINE_END.split(read_text(path)), start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab or not name.strip() or not caption.strip():
            raise ValueError(f"{path}, line {number}: expected file<TAB>caption, got {line!r}")
        table.setdefault(name.strip(), []).append(caption.strip())
    return table


class _Object(list[tuple[str, Any]]):
    """A JSON object with its names as often as they stand there: a file listed twice has all its captions."""


def _from_json(path: Path) -> dict[str, list[str]]:
    text = read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:  # also for thousands of brackets, or of digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, _Object):
        raise ValueError(f'{path} must hold {{"file": "caption"}}, got a {type(content).__name__}')
    table: dict[str, list[str]] = {}
    for name, entry in content:
        table.setdefault(name, []).extend(_captions(path, name, entry))
    return table


def _captions(path: Path, name: str, entry: Any) -> Iterable[str]:
    captions = [entry] if isinstance(entry, str) else entry
    if not isinstance(captions, list) or not captions or not all(map(is_text, captions)):
        raise ValueError(f"{path}: {name} must have a caption or a list of captions, got {entry!r}")
    return (text.strip() for text in captions)


def is_text(entry: Any) -> bool:
    """Whether it is a caption: not empty, and without halves of surrogate pairs, which JSON can hold."""
    return isinstance(entry, str) and bool(entry.strip()) and not re.search("[\ud800-\udfff]", entry)


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    ValueError that says which line is of another encoding and how to convert the file.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        said = (
            f"{path} is damaged or not {encoding.upper().removesuffix('-SIG')}: line {line}, {error.reason}"
        )
        if encoding != "utf-8":
            raise ValueError(f"{said}; save it as UTF-8") from None
        raise ValueError(f"{said}; {_conversion(path, 'GB18030', 'GBK')}") from None
    if "\0" in text:
        if not _may_be_utf16(content):
            line = text[: text.index("\0")].count("\n") + 1
            raise ValueError(f"{path} is damaged: line {line} holds a zero byte; take it out")
        half = "UTF-16BE" if content[:1] == b"\0" else "UTF-16LE"
        raise ValueError(f"{path} holds zero bytes, as UTF-16 does; {_conversion(path, half, half)}")
    return text


def _may_be_utf16(content: bytes) -> bool:
    """Whether the zero bytes are those of UTF-16: one with each tab and each line end, all on one side."""
    zeros = content.count(0)
    return zeros >= max(2, 2 * content.count(b"\n")) and zeros in (
        content[::2].count(0),
        content[1::2].count(0),
    )


def _conversion(path: Path, encoding: str, called: str) -> str:
    old, new, before = (shlex.quote(f"{path}{end}") for end in ("", ".utf8", ".before"))
    converted = f"iconv -f {encoding} -t UTF-8 {old} > {new}"
    return f"if it is {called}: {converted} && mv {old} {before} && mv {new} {old}"
