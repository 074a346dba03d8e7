# SPDX-License-Identifier: Apache-2.0
"""Pictures with captions, from any source, to rows of tokens on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from cogview.config import require_workers
from cogview.data.caption_files import CAPTION_LISTS
from cogview.data.pairs import is_shards, open_pairs
from cogview.data.row_writer import row_format, write_rows
from cogview.data.rows import HEAD, Rows, is_rows
from cogview.data.samples import PairSamples, Samples
from cogview.data.webdataset import ShardSamples
from cogview.device import default_device
from cogview.files import StrPath, require_folder
from cogview.tokens.tokenizers import load_tokenizers

MOST_TEXT_TOKENS = 1 << 16  # Every row has room for so many.


@dataclass(frozen=True)
class Tokenize:
    """Write the rows of ``data`` into the folder ``out``, with the tokenizers of the run folder ``run``."""

    data: StrPath  # a folder of images with captions, WebDataset shards, or built-in data
    out: StrPath
    run: StrPath
    max_text_tokens: int = 64  # of a row, as in the released code; a longer caption loses its end
    workers: int = 4  # threads that read pictures
    device: str = field(default_factory=default_device)
    progress: bool = True

    def __post_init__(self) -> None:
        require_workers(1, self.workers)
        if not 1 <= self.max_text_tokens <= MOST_TEXT_TOKENS:
            raise ValueError(
                f"max_text_tokens must be from 1 to {MOST_TEXT_TOKENS}, got {self.max_text_tokens}"
            )


def tokenize(options: Tokenize) -> Rows:
    """Write the rows, or finish what an interrupted call began; see :func:`write_rows`.

    Raises:
        ValueError: ``out`` holds rows of other data or tokenizers, or pictures with captions, which would
            be taken for rows from then on; or no picture can be read.
        FileNotFoundError: no such data, or no tokenizers in the run folder.
        OSError: a command that writes a shard failed.
    """
    out = Path(options.out)
    if any((out / name).exists() for name in CAPTION_LISTS):
        raise ValueError(
            f"--out {out} holds pictures with captions, which would be taken for rows from then on; name "
            "another folder"
        )
    if not (out / HEAD).is_file():
        require_folder(out)
    tokenizers = load_tokenizers(options.run, options.device)
    samples = _samples(options.data)
    wanted = row_format(samples, tokenizers, options.max_text_tokens)
    return write_rows(
        samples, tokenizers, options.out, wanted, workers=options.workers, progress=options.progress
    )


def _samples(data: StrPath) -> Samples:
    if is_shards(data):
        return ShardSamples(os.fspath(data))
    if is_rows(data):
        raise ValueError(f"{data} holds rows of tokens already; --data takes pictures with captions")
    return PairSamples(open_pairs(data, skip_bad=True))
