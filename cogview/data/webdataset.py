# SPDX-License-Identifier: Apache-2.0
"""WebDataset shards: tar files in which ``0001.jpg`` and ``0001.txt`` (or ``.json``) are one sample.

Shards are paths with braces (``photos-{000..499}.tar``), or commands that write one (``pipe:cat x.tar``).
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cogview.data.caption_files import is_text
from cogview.data.fingerprint import contents
from cogview.data.image_files import read_pixels, to_unit_range
from cogview.data.samples import Sample

PICTURES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "ppm")
TEXTS = ("txt", "text", "caption")
KEYS = ("caption", "captions", "text")  # in a sample's JSON


class ShardSamples:
    """The samples of shards, each shard a part.

    A shard on this machine that is damaged gives what lies before the damage, and is told as bad. A command
    that fails is an OSError: it may succeed when it is repeated, and the work then goes on from there.
    """

    num_images: None = None
    left_out: tuple[str, ...] = ()

    def __init__(self, pattern: str) -> None:
        from webdataset.shardlists import expand_urls

        self.parts: list[str] = expand_urls(pattern)
        absent = [url for url in self.parts if _is_local(url) and not Path(url).is_file()]
        if absent:
            raise FileNotFoundError(f"{len(absent)} of {len(self.parts)} shards are not there: {absent[0]}")

    def part(self, number: int, first: int) -> Iterator[Sample]:
        url = self.parts[number]
        for index, found in enumerate(_samples(url)):
            if index >= first:
                yield _sample(url, found) if isinstance(found, dict) else _unreadable(url, found)

    def identity(self) -> Iterator[bytes]:
        """Names and, of files on this machine, sizes of the shards, and what tells contents apart."""
        for url in self.parts:
            size = Path(url).stat().st_size if _is_local(url) else 0
            yield repr((Path(url).name if _is_local(url) else url, size)).encode()
        yield from contents([Path(url) for url in self.parts if _is_local(url)])


def _is_local(url: str) -> bool:
    return not url.startswith("pipe:") and "://" not in url


def _samples(url: str) -> Iterator[dict[str, Any] | Exception]:
    """The raw samples of a shard; last, for a file of this machine, what is wrong with it."""
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys, tar_file_expander

    stream: Any = None
    try:
        with gopen(url) as stream:
            yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
        if _is_local(url) and url.endswith(".tar") and not _has_end(Path(url)):
            # tarfile takes a file that ends between two entries for a whole one.
            raise ValueError("the file is cut short, as it lacks the mark of its end")
    except Exception as error:  # tarfile, gzip and the operating system have many kinds of them.
        if not _is_local(url):
            reason = _reason(error, stream)
            raise OSError(f"{url} failed: {reason}; repeat the command to go on from there") from None
        yield error


def _reason(error: Exception, stream: Any) -> str:
    """What is wrong, in words: webdataset adds its objects to what its libraries say."""
    status = getattr(stream, "status", None) or re.search(r": exit (-?\d+) \(", str(error))
    number = int(status[1]) if isinstance(status, re.Match) else status
    if number:
        return f"signal {-number} ended it" if number < 0 else f"its exit status is {number}"
    if isinstance(error, tarfile.TarError):
        return f"what it writes is no whole tar file ({error.args[0] if error.args else error})"
    return str(error)


def _has_end(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-min(1024, path.stat().st_size), io.SEEK_END)
        return not any(file.read())


def _unreadable(url: str, error: Exception) -> Sample:
    def read(size: int) -> Tensor:
        raise ValueError(f"the rest of the shard cannot be read: {error.args[0] if error.args else error}")

    return Sample(url, (), read)


def _sample(url: str, found: Mapping[str, Any]) -> Sample:
    name = f"{url}/{found['__key__']}"
    return Sample(name, _captions(found), partial(_picture, found, name))


def _picture(found: Mapping[str, Any], name: str, size: int) -> Tensor:
    content = next((found[kind] for kind in PICTURES if kind in found), None)
    if content is None:
        raise ValueError(f"{name} has no picture ({', '.join(PICTURES)})")
    if not _captions(found):
        raise ValueError(f"{name} has no caption in UTF-8 (txt, or json with one of {', '.join(KEYS)})")
    return to_unit_range(read_pixels(io.BytesIO(content), size, name))


def _captions(found: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        texts = [found[kind].decode() for kind in TEXTS if kind in found]
        if not texts and "json" in found:
            content = json.loads(found["json"])
            texts = next(([content[key]] for key in KEYS if isinstance(content.get(key), str)), [])
            texts = texts or next((content[key] for key in KEYS if isinstance(content.get(key), list)), [])
    except (ValueError, AttributeError, RecursionError):  # the last for thousands of brackets
        return ()
    return tuple(text.strip() for text in texts if is_text(text))
