# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens on disk, mapped into memory: what a training reads of data of any size.

``rows.bin`` is the compact format of the released code: per caption a row of int32, first the text's ids in
the model's vocabulary, padded with -1 to ``text_width`` (64 there), then the codes of its image. The rows of
an image lie together. Beside it in the folder::

    rows.json      what the rows were made of and with; it is there once all rows are
    images.bin     int64 [images, 2]: an image's first row; a hash of the image, 63 bits
    skipped.tsv    what was left out, and why
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cogview.files import StrPath, digest, read_json
from cogview.settings import build
from cogview.tokens.text_tokenizer import UNKNOWN
from cogview.tokens.vocab import Vocab

ROWS, IMAGES, HEAD, SKIPPED = "rows.bin", "images.bin", "rows.json", "skipped.tsv"
PADDING = -1
KEY_BITS = 63
# Bytes of a file that gets a digest, with which it is compared each time it is opened, in a fraction of a
# second. To read larger ones would take long.
CHECKED_BYTES = 256 << 20


def image_key(identity: bytes) -> int:
    """A hash of what makes an image that one and no other: of its codes, or of what it is a copy of."""
    digest = hashlib.blake2b(identity, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - KEY_BITS)


def skipped_lines(entries: Iterable[Iterable[str]]) -> bytes:
    """Lines of ``skipped.tsv``, whatever the names are: a line end or a tab becomes a space."""
    lines = ("\t".join(re.sub(r"[\t\r\n]", " ", part) for part in entry) for entry in entries)
    return "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")


@dataclass(frozen=True)
class RowFormat:
    """What rows are made of and with. Rows of equal formats are equal."""

    text_width: int
    num_codes: int
    num_image_codes: int
    num_text_pieces: int
    source: str  # fingerprint of the pictures and captions
    tokenizers: str  # fingerprint of the tokenizers
    version: int = 1

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.text_width + self.num_codes


@dataclass
class CaptionLengths:
    """How long captions are, in tokens, before any of them is cut."""

    counts: dict[str, int] = field(default_factory=dict)  # by the number of tokens, as JSON has its keys
    with_unknown: int = 0  # captions with a part that the text tokenizer does not know

    def add(self, lengths: Iterable[int], with_unknown: int) -> None:
        """Count more captions."""
        for length, count in Counter(lengths).items():
            self.counts[str(length)] = self.counts.get(str(length), 0) + count
        self.with_unknown += with_unknown

    @property
    def longest(self) -> int:
        """Tokens of the longest caption."""
        return max(map(int, self.counts), default=0)

    @property
    def count(self) -> int:
        """How many captions there are."""
        return sum(self.counts.values())

    def longer_than(self, max_text_tokens: int) -> int:
        """How many captions have more tokens."""
        return sum(count for length, count in self.counts.items() if int(length) > max_text_tokens)


@dataclass(frozen=True)
class RowsHead:
    """``rows.json``."""

    format: RowFormat
    images: int
    rows: int
    skipped: int
    content: str  # digest of all rows
    captions: CaptionLengths
    digests: dict[str, str] = field(default_factory=dict)  # of the files that are checked


class Rows:
    """Images as codes, each with one or more texts.

    Args:
        tokens: int32 ``[R, text_width + num_codes]``, as in ``rows.bin``.
        images: int64 ``[N, 2]``, as in ``images.bin``.
        folder: where both are mapped from, if they are.
    """

    def __init__(self, head: RowsHead, tokens: np.ndarray, images: np.ndarray, folder: Path | None = None):
        self.head, self.folder = head, folder
        self._tokens, self._images = tokens, images

    @classmethod
    def in_memory(cls, vocab: Vocab, codes: Tensor, captions: Sequence[Sequence[Sequence[int]]]) -> Rows:
        """Rows from codes ``[N, num_codes]`` and, for each image, its captions as piece ids."""
        texts = [text for of_image in captions for text in of_image]
        counts = [len(of_image) for of_image in captions]
        if len(counts) != len(codes) or not all(counts):
            raise ValueError(f"each of {len(codes)} images must have captions, got {counts}")
        width = max(map(len, texts))
        tokens = np.full((len(texts), width + codes.shape[1]), PADDING, dtype=np.int32)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = np.array(text, dtype=np.int32) + vocab.text_start
        all_codes = codes.cpu().numpy().astype(np.int32)
        tokens[:, width:] = np.repeat(all_codes, counts, axis=0)
        keys = [image_key(row.tobytes()) for row in all_codes]
        images = np.stack([np.cumsum([0, *counts[:-1]]), np.array(keys, dtype=np.int64)], axis=1)
        lengths = CaptionLengths()
        lengths.add(map(len, texts), sum(UNKNOWN in text for text in texts))
        kind = RowFormat(width, codes.shape[1], vocab.num_image_codes, vocab.num_text_pieces, "", "")
        content = hashlib.blake2b(tokens.tobytes(), digest_size=16).hexdigest()
        return cls(RowsHead(kind, len(images), len(tokens), 0, content, lengths), tokens, images)

    def __reduce__(self) -> Any:
        # A process that loads data maps the files itself: pickled, a mapped array is its whole content.
        if self.folder is not None:
            return open_rows, (self.folder,)
        return Rows, (self.head, self._tokens, self._images)

    def __len__(self) -> int:
        return len(self._images)

    @property
    def num_codes(self) -> int:
        """Codes of each image."""
        return self.head.format.num_codes

    def read(self, image: int, choice: float = 0.0) -> tuple[list[int], list[int]]:
        """Piece ids of a text of an image, and its codes; ``choice`` in [0, 1) picks the text."""
        first = int(self._images[image, 0])
        last = int(self._images[image + 1, 0]) if image + 1 < len(self) else len(self._tokens)
        row = self._tokens[first + int(choice * (last - first))]
        text, codes = np.split(row, [self.head.format.text_width])
        num_codes, num_pieces = self.head.format.num_image_codes, self.head.format.num_text_pieces
        pieces = text[text != PADDING] - num_codes
        if not (_within(pieces, num_pieces) and _within(codes, num_codes)):
            where = "rows" if self.folder is None else self.folder / ROWS
            raise ValueError(
                f"{where} are damaged: a row of image {image} holds what is no token; remove their "
                "folder, and the same command as before writes them anew"
            )
        return pieces.tolist(), codes.tolist()

    def chosen(self, share: float) -> np.ndarray:
        """About ``share`` of the images, in order: by the hash of each, whatever else is among them."""
        return np.flatnonzero(self._images[:, 1] < int(share * 2**KEY_BITS))

    def identity(self) -> Iterator[bytes]:
        """See :func:`cogview.data.fingerprint.fingerprint`."""
        yield repr((self.head.content, self.head.format.width, self.head.rows, self.head.images)).encode()


def _within(ids: np.ndarray, count: int) -> bool:
    return not len(ids) or (ids.min() >= 0 and ids.max() < count)


class RowSubset:
    """The images of ``rows`` that ``images`` lists, or all others. Memory is that of the list."""

    def __init__(self, rows: Rows, images: np.ndarray, *, others: bool = False) -> None:
        self.rows, self._images, self._others = rows, images, others
        self.num_codes = rows.num_codes
        self._length = len(rows) - len(images) if others else len(images)
        self._others_before = images - np.arange(len(images))  # how many others lie before each listed image

    def __len__(self) -> int:
        return self._length

    def read(self, image: int, choice: float = 0.0) -> tuple[list[int], list[int]]:
        """As :meth:`Rows.read`."""
        if self._others:
            image += int(np.searchsorted(self._others_before, image, side="right"))
        else:
            image = int(self._images[image])
        return self.rows.read(image, choice)


def split_rows(rows: Rows, share: float) -> tuple[Rows | RowSubset, RowSubset | None]:
    """The images to train on and about ``share`` of them to validate on; None for a share of 0.

    On which side an image lies follows from its own codes, so data that are added move none. ValueError if
    nothing is left for one of the two.
    """
    if not share:
        return rows, None
    images = rows.chosen(share)
    if not 0 < len(images) < len(rows):
        raise ValueError(
            f"validation={share} takes {len(images)} of {len(rows)} images; take another share, or 0 for none"
        )
    return RowSubset(rows, images, others=True), RowSubset(rows, images)


def is_rows(folder: StrPath) -> bool:
    """Whether ``folder`` holds rows of tokens, finished or not."""
    return (Path(folder) / HEAD).is_file() or (Path(folder) / ROWS).is_file()


def open_rows(folder: StrPath) -> Rows:
    """Map the rows of a folder that ``cogview tokenize`` wrote.

    FileNotFoundError if there are none or they are not finished, ValueError if they are damaged.
    """
    folder = Path(folder)
    if not (folder / HEAD).is_file():
        state = "are not finished" if is_rows(folder) else "are not there"
        raise FileNotFoundError(f"the rows in {folder} {state}: write them with cogview tokenize")
    try:
        head = build(RowsHead, read_json(folder / HEAD))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / HEAD} is damaged: {error}") from None
    tokens = _map(folder / ROWS, np.int32, (head.rows, head.format.width), advice=mmap.MADV_RANDOM)
    images = _map(folder / IMAGES, np.int64, (head.images, 2))
    for name, expected in head.digests.items():
        path = folder / name
        if digest(path) != expected:
            raise ValueError(f"{path} is not as it was written; {_anew(path)}")
    return Rows(head, tokens, images, folder)


def _anew(path: Path) -> str:
    return f"remove the folder {path.parent}, and the same command as before writes the rows anew"


def _map(path: Path, kind: type, shape: tuple[int, int], advice: int = mmap.MADV_NORMAL) -> np.ndarray:
    # Rows are read in random order: reading ahead, the system would read thirty times what is used.
    expected = shape[0] * shape[1] * np.dtype(kind).itemsize
    size = path.stat().st_size if path.is_file() else 0
    if size != expected or not expected:
        raise ValueError(f"{path} must have {expected} bytes, has {size}; {_anew(path)}")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(advice)
    return np.frombuffer(mapped, kind).reshape(shape)
