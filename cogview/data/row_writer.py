# SPDX-License-Identifier: Apache-2.0
"""Writes rows of tokens, chunk by chunk: a kill or a loss of power costs a second's work or one chunk.

A chunk is always made of the same samples, whatever was interrupted where, so that the image tokenizer sees
the same batches and the result is the same. What has been written counts once ``writing.json`` says so, and
that is told only of what is on the disk; a later call cuts off the rest.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from cogview.data.fingerprint import fingerprint
from cogview.data.rows import (
    CHECKED_BYTES,
    HEAD,
    IMAGES,
    PADDING,
    ROWS,
    SKIPPED,
    CaptionLengths,
    RowFormat,
    Rows,
    RowsHead,
    image_key,
    open_rows,
    skipped_lines,
)
from cogview.data.samples import Sample, Samples, read_ahead
from cogview.files import StrPath, digest, lock, read_json, write_json
from cogview.progress import Progress
from cogview.settings import build, plain
from cogview.tokens.sequence import fit_text
from cogview.tokens.text_tokenizer import UNKNOWN
from cogview.tokens.tokenizers import Tokenizers
from cogview.tokens.vqvae import ImageTokenizer

CHUNK = 64  # images that are encoded together
STATE = "writing.json"
# Seconds from one state to the next at least: to wait for the disk may take as long as a chunk of small
# pictures takes.
SAVE_EVERY = 1.0


@dataclass
class _State:
    """How far the work is: everything that the next chunk depends on."""

    format: RowFormat
    part: int = 0
    taken: int = 0  # samples of the part
    images: int = 0
    rows: int = 0
    skipped: int = 0
    skipped_bytes: int = 0
    content: str = ""
    captions: CaptionLengths = field(default_factory=CaptionLengths)


Encode = Callable[[ImageTokenizer, Tensor], Tensor]  # pictures [N, 3, S, S] to codes [N, num_codes]


def encode_whole(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """The codes of each picture in raster order."""
    return tokenizer.encode(images).flatten(1)


class _Encoder:
    """Captions and pictures as rows."""

    def __init__(self, tokenizers: Tokenizers, text_width: int, encode: Encode) -> None:
        self.image = tokenizers.image.eval()
        self.encode = encode
        self.device = next(self.image.parameters()).device
        # Captions repeat, above all those of the digits.
        self.texts = lru_cache(maxsize=1 << 14)(self._texts)
        self._tokenizers, self._width = tokenizers, text_width

    def _texts(self, captions: tuple[str, ...]) -> tuple[np.ndarray, list[int], int]:
        """Ids ``[captions, text_width]``, the lengths before any is cut, and how many have unknown parts."""
        ids = np.full((len(captions), self._width), PADDING, dtype=np.int32)
        pieces = [self._tokenizers.text.encode(caption) for caption in captions]
        for row, text in zip(ids, pieces, strict=True):
            cut = fit_text(text, self._width, truncate=True)
            row[: len(cut)] = np.array(cut, dtype=np.int32) + self._tokenizers.vocab.text_start
        return ids, [len(text) for text in pieces], sum(UNKNOWN in text for text in pieces)

    @torch.no_grad()
    def codes(self, pictures: Sequence[Tensor]) -> np.ndarray:
        """int32 ``[N, num_codes]``."""
        images = torch.stack(list(pictures)).to(self.device)
        return self.encode(self.image, images).cpu().numpy().astype(np.int32)


class _Files:
    """The files being written, which no other process may write to meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        with ExitStack() as opened:
            for name in (ROWS, IMAGES, SKIPPED):
                self._files[name] = opened.enter_context((folder / name).open("ab"))
            try:
                lock(self._files[ROWS], folder)
            except BlockingIOError:
                raise BlockingIOError(
                    f"another process is writing rows to {folder}; wait until it ends, or choose another "
                    "folder"
                ) from None
            self._open = opened.pop_all()

    def go_on_from(self, state: _State) -> _State:
        """The state to go on from, with the files cut to what it counts.

        That is ``state``, or the beginning where a file is shorter than ``state`` counts.
        """
        sizes = {
            ROWS: 4 * state.rows * state.format.width,
            IMAGES: 16 * state.images,
            SKIPPED: state.skipped_bytes,
        }
        for name, size in sizes.items():
            found = os.fstat(self._files[name].fileno()).st_size
            if found < size:
                warnings.warn(
                    f"{self._folder / name} is damaged: it has {found} bytes where {STATE} counts {size}, as "
                    "a loss of power may leave it; all rows are written anew",
                    stacklevel=4,
                )
                return self.go_on_from(_State(state.format))
        for name, size in sizes.items():
            self._files[name].truncate(size)
        return state

    def append(self, rows: bytes, images: bytes, skipped: bytes) -> None:
        for name, content in ((ROWS, rows), (IMAGES, images), (SKIPPED, skipped)):
            self._files[name].write(content)

    def save(self, state: _State) -> None:
        """Put on the disk what was appended, and then that it counts."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self._folder / STATE, plain(state))

    def close(self) -> None:
        self._open.close()


def _add(encoder: _Encoder, chunk: list[tuple[Sample, Tensor | str]], files: _Files, state: _State) -> None:
    good = [(sample, picture) for sample, picture in chunk if isinstance(picture, Tensor)]
    bad = [(sample.name, picture) for sample, picture in chunk if isinstance(picture, str)]
    rows, images = [], []
    all_codes = encoder.codes([picture for _, picture in good]) if good else ()
    for (sample, _), codes in zip(good, all_codes, strict=True):
        texts, lengths, with_unknown = encoder.texts(tuple(sample.captions))
        state.captions.add(lengths, with_unknown)
        images.append(
            (state.rows, image_key(codes.tobytes() if sample.origin is None else sample.origin.encode()))
        )
        rows.append(np.hstack([texts, np.broadcast_to(codes, (len(texts), len(codes)))]))
        state.rows += len(texts)
    content = b"".join(row.tobytes() for row in rows)
    skipped = skipped_lines(bad)
    files.append(content, np.array(images, dtype=np.int64).tobytes(), skipped)
    state.content = hashlib.blake2b(state.content.encode() + content, digest_size=16).hexdigest()
    state.images += len(good)
    state.skipped += len(bad)
    state.skipped_bytes += len(skipped)
    state.taken += len(chunk)


def row_format(
    samples: Samples, tokenizers: Tokenizers, text_width: int, num_codes: int | None = None
) -> RowFormat:
    """The format of the rows that ``samples`` give; ``num_codes`` None: the codes of whole pictures."""
    return RowFormat(
        text_width,
        tokenizers.image.config.codes_per_image if num_codes is None else num_codes,
        tokenizers.vocab.num_image_codes,
        tokenizers.vocab.num_text_pieces,
        fingerprint(samples),
        tokenizers.fingerprint,
    )


def _begun(folder: Path) -> _State | None:
    """What an earlier call left, if that can be gone on with."""
    try:
        state = build(_State, read_json(folder / STATE))
    except (FileNotFoundError, TypeError, ValueError):
        return None
    return state if state.rows else None  # A first try that read nothing binds no folder to its data.


def _started_with(folder: Path) -> RowFormat | None:
    if (folder / HEAD).is_file():
        return open_rows(folder).head.format
    state = _begun(folder)
    return state.format if state else None


def has_rows(folder: StrPath, wanted: RowFormat) -> bool:
    """Whether ``folder`` holds all rows of that format."""
    folder = Path(folder)
    return (folder / HEAD).is_file() and open_rows(folder).head.format == wanted


def write_rows(
    samples: Samples,
    tokenizers: Tokenizers,
    folder: StrPath,
    wanted: RowFormat,
    *,
    encode: Encode = encode_whole,
    workers: int = 4,
    replace: bool = False,
    progress: bool = True,
) -> Rows:
    """Write the rows of ``samples`` to ``folder``, or go on where an interrupted call stopped.

    A picture that cannot be read is left out, counted, and listed in ``skipped.tsv``. A caption of more
    tokens than a row has room for loses its end. Rows that are finished are returned as they are.

    Args:
        wanted: :func:`row_format` of the same samples and tokenizers.
        encode: what gives the codes of pictures.
        workers: threads that read pictures.
        replace: write anew what was made of other data or with other tokenizers, rather than refuse to.

    Raises:
        ValueError: the folder holds rows of other data or tokenizers, or no picture can be read.
        BlockingIOError: another process writes there.
    """
    folder = Path(folder)
    found = _started_with(folder)
    if found is not None and found != wanted:
        if not replace:
            raise ValueError(f"{folder} holds rows of {_difference(found, wanted)}; choose another folder")
        for name in (HEAD, STATE):
            (folder / name).unlink(missing_ok=True)
    if not (folder / HEAD).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        encoder = _Encoder(tokenizers, wanted.text_width, encode)
        _write(samples, encoder, folder, wanted, workers, progress)
    return open_rows(folder)


def _difference(found: RowFormat, wanted: RowFormat) -> str:
    if found.tokenizers != wanted.tokenizers:
        return "other tokenizers"
    return "other data" if found.source != wanted.source else "another width"


def _write(
    samples: Samples, encoder: _Encoder, folder: Path, wanted: RowFormat, workers: int, progress: bool
) -> None:
    files = _Files(folder)
    state = files.go_on_from(_begun(folder) or _State(wanted))
    saved = time.monotonic()
    known = samples.num_images
    total, unit = (len(samples.parts), "shard") if known is None else (known, "image")
    done = state.part if known is None else state.taken
    size = encoder.image.config.image_size
    try:
        with Progress(total, "write rows", unit=unit, initial=done, enabled=progress) as bar:
            if not state.skipped:
                missing = skipped_lines((name, "not there") for name in samples.left_out)
                state.skipped, state.skipped_bytes = len(samples.left_out), len(missing)
                files.append(b"", b"", missing)
            for number in range(state.part, len(samples.parts)):
                for chunk in read_ahead(samples.part(number, state.taken), size, CHUNK, workers):
                    _add(encoder, chunk, files, state)
                    if time.monotonic() - saved >= SAVE_EVERY:
                        files.save(state)
                        saved = time.monotonic()
                    bar.update(0 if known is None else len(chunk), _so_far(state))
                state.part, state.taken = number + 1, 0
                files.save(state)
                bar.update(1 if known is None else 0, _so_far(state))
    finally:
        if not state.rows:
            for name in (ROWS, IMAGES, STATE):
                (folder / name).unlink(missing_ok=True)
        files.close()
    if not state.images:
        raise ValueError(f"no picture could be read; {folder / SKIPPED} says why")
    counted = (state.format, state.images, state.rows, state.skipped, state.content, state.captions)
    checked = [name for name in (ROWS, IMAGES) if (folder / name).stat().st_size <= CHECKED_BYTES]
    head = RowsHead(*counted, {name: digest(folder / name) for name in checked})
    write_json(folder / HEAD, plain(head))
    (folder / STATE).unlink()


def _so_far(state: _State) -> str:
    return f"{state.images} images" + (f", {state.skipped} left out" if state.skipped else "")
