# SPDX-License-Identifier: Apache-2.0
"""Images with captions: the user's own folder or the built-in digits, and batches of token rows.

A folder holds images and one list of captions, ``captions.tsv`` (``file<TAB>caption`` per line, a file
may have several lines) or ``captions.json`` (``{"file": "caption"}`` or ``{"file": ["one", "two"]}``),
UTF-8, file names relative to the folder.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cogview.data.digits import DigitPairs
from cogview.seeding import derive_seed
from cogview.tokens.sequence import (
    FRAME_TOKENS,
    Batch,
    fit_text,
    image_to_text_row,
    make_batch,
    text_to_image_row,
)
from cogview.tokens.text_tokenizer import TextTokenizer
from cogview.tokens.vocab import Vocab
from cogview.tokens.vqvae import ImageTokenizer


class Pairs(Protocol):
    """Images and their captions."""

    def __len__(self) -> int: ...

    def image(self, index: int, size: int) -> Tensor:
        """``[3, size, size]`` in [0, 1]."""

    def captions(self, index: int) -> list[str]:
        """At least one caption."""


def read_image(path: str | os.PathLike[str], size: int) -> Tensor:
    """An image file as ``[3, size, size]`` float32 in [0, 1]: shorter side to ``size``, centre cropped.

    Grayscale and palette files become RGB, transparency is laid on white. FileNotFoundError if absent,
    ValueError if it cannot be read as an image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image not found: {path}")
    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    width, height = picture.size
    scale = size / min(width, height)
    resized = (max(size, round(width * scale)), max(size, round(height * scale)))
    if resized != picture.size:
        picture = picture.resize(resized, Image.Resampling.BICUBIC)
    left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


class FolderPairs:
    """A folder of images with ``captions.tsv`` or ``captions.json``."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f'data folder not found: {self.folder} (the built-in data is "digits")')
        table = self._read_captions()
        self._items = sorted(table.items())
        if not self._items:
            raise ValueError(f"{self.folder}: the caption list is empty")
        for name, _ in self._items:
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{self.folder}: the caption list names {name}, which is not there")

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
        return read_image(self.folder / self._items[index][0], size)

    def captions(self, index: int) -> list[str]:
        """The captions listed for the file."""
        return self._items[index][1]


def open_pairs(data: str, *, digit_copies: int = 1) -> Pairs:
    """``"digits"`` for the built-in training scans, anything else is a folder."""
    return DigitPairs("train", digit_copies) if data == "digits" else FolderPairs(data)


def epoch_order(seed: int, epoch: int, length: int) -> Tensor:
    """The permutation in which an epoch visits its items: a pure function, so a resumed run agrees."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    return torch.randperm(length, generator=generator)


def batch_indices(seed: int, step: int, batch_size: int, length: int) -> list[int]:
    """Items of one step, running through one epoch after another; a batch may straddle two."""
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position + len(indices), length)
        indices += epoch_order(seed, epoch, length)[offset : offset + batch_size - len(indices)].tolist()
    return indices


@torch.no_grad()
def encode_images(pairs: Pairs, tokenizer: ImageTokenizer, *, progress: bool = True) -> Tensor:
    """Codes of every image, int64 ``[len(pairs), codes_per_image]``."""
    tokenizer.eval()
    device = next(tokenizer.parameters()).device
    parts = []
    with tqdm(total=len(pairs), desc="encode images", unit="image", disable=not progress) as bar:
        for images in image_batches(pairs, tokenizer.config.image_size, 64):
            parts.append(tokenizer.encode(images.to(device)).flatten(1).cpu())
            bar.update(len(images))
    return torch.cat(parts)


def image_batches(pairs: Pairs, size: int, batch_size: int) -> Iterator[Tensor]:
    """All images in order, ``[<= batch_size, 3, size, size]`` at a time."""
    for start in range(0, len(pairs), batch_size):
        indices = range(start, min(start + batch_size, len(pairs)))
        yield torch.stack([pairs.image(index, size) for index in indices])


class TokenDataset:
    """Codes and tokenised captions, turned into batches of both orders.

    Args:
        codes: ``[N, num_codes]``.
        captions: per image, its captions as piece ids.
        length: tokens per row, padding included; every row must fit.
    """

    def __init__(
        self, vocab: Vocab, codes: Tensor, captions: Sequence[Sequence[Sequence[int]]], length: int
    ) -> None:
        if len(codes) != len(captions) or not len(codes):
            raise ValueError(f"codes and captions must be equally many, got {len(codes)} and {len(captions)}")
        longest = max(len(text) for texts in captions for text in texts)
        if FRAME_TOKENS + codes.shape[1] + longest > length:
            raise ValueError(
                f"rows of length={length} cannot hold {codes.shape[1]} codes, {FRAME_TOKENS} framing tokens "
                f"and the longest text of {longest} tokens; truncate the text"
            )
        self.vocab = vocab
        self.length = length
        self._codes: list[list[int]] = codes.tolist()
        self._captions = captions

    def __len__(self) -> int:
        return len(self._codes)

    def batch(
        self, step: int, batch_size: int, *, text_weight: float, caption_fraction: float, seed: int
    ) -> Batch:
        """The rows of one training step: a pure function of its arguments.

        Each row draws one of its image's captions, and is in image-to-text order with probability
        ``caption_fraction``.
        """
        choice = random.Random(derive_seed(seed, "rows", step))
        rows = []
        for index in batch_indices(seed, step, batch_size, len(self)):
            text = choice.choice(self._captions[index])
            make_row = image_to_text_row if choice.random() < caption_fraction else text_to_image_row
            rows.append(make_row(self.vocab, text, self._codes[index]))
        return make_batch(self.vocab, rows, self.length, text_weight)


def tokenize_captions(
    pairs: Pairs, tokenizer: TextTokenizer, max_text_tokens: int
) -> tuple[list[list[list[int]]], int]:
    """Every image's captions as piece ids, and how many lost their end to ``max_text_tokens``."""
    cut = 0
    captions = []
    for index in range(len(pairs)):
        texts = [tokenizer.encode(caption) for caption in pairs.captions(index)]
        cut += sum(len(text) > max_text_tokens for text in texts)
        captions.append([fit_text(text, max_text_tokens, truncate=True) for text in texts])
    return captions, cut
