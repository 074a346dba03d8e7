# SPDX-License-Identifier: Apache-2.0
"""Pictures and captions as tokens, and batches of token rows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cogview.data.order import batch_indices
from cogview.data.pairs import Pairs
from cogview.progress import Progress
from cogview.seeding import derive_seed
from cogview.tokens.sequence import (
    FRAME_TOKENS,
    Batch,
    drop_texts,
    fit_text,
    image_to_text_row,
    make_batch,
    text_to_image_row,
)
from cogview.tokens.text_tokenizer import UNKNOWN, TextTokenizer
from cogview.tokens.vocab import Vocab
from cogview.tokens.vqvae import ImageTokenizer


@torch.no_grad()
def encode_images(pairs: Pairs, tokenizer: ImageTokenizer, *, progress: bool = True) -> Tensor:
    """Codes of every image, int64 ``[len(pairs), codes_per_image]``."""
    tokenizer.eval()
    device = next(tokenizer.parameters()).device
    parts = []
    with Progress(len(pairs), "encode images", unit="image", enabled=progress) as bar:
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
        self,
        step: int,
        batch_size: int,
        *,
        text_weight: float,
        caption_fraction: float,
        seed: int,
        text_dropout: float = 0.0,
    ) -> Batch:
        """The rows of one training step: a pure function of its arguments.

        Each row draws one of its image's captions, and is in image-to-text order with probability
        ``caption_fraction``. ``text_dropout``: see :func:`cogview.tokens.sequence.drop_texts`.
        """
        choice = random.Random(derive_seed(seed, "rows", step))
        rows = []
        for index in batch_indices(seed, step, batch_size, len(self)):
            text = choice.choice(self._captions[index])
            make_row = image_to_text_row if choice.random() < caption_fraction else text_to_image_row
            rows.append(make_row(self.vocab, text, self._codes[index]))
        rows = drop_texts(self.vocab, rows, text_dropout, derive_seed(seed, "text dropout", step))
        return make_batch(self.vocab, rows, self.length, text_weight)


@dataclass(frozen=True)
class Captions:
    """Captions as piece ids."""

    pieces: list[list[list[int]]]  # per image, each of its captions

    @property
    def longest(self) -> int:
        """Tokens of the longest caption."""
        return max(len(text) for texts in self.pieces for text in texts)

    @property
    def count(self) -> int:
        """How many captions there are."""
        return sum(len(texts) for texts in self.pieces)

    def longer_than(self, max_text_tokens: int) -> int:
        """How many captions have more tokens."""
        return sum(len(text) > max_text_tokens for texts in self.pieces for text in texts)

    def with_unknown(self) -> int:
        """How many captions have a part that the text tokenizer does not know."""
        return sum(UNKNOWN in text for texts in self.pieces for text in texts)

    def cut(self, max_text_tokens: int) -> Captions:
        """The same captions without what goes beyond ``max_text_tokens``."""
        if self.longest <= max_text_tokens:
            return self
        return Captions(
            [[fit_text(text, max_text_tokens, truncate=True) for text in texts] for texts in self.pieces]
        )


def tokenize_captions(pairs: Pairs, tokenizer: TextTokenizer) -> Captions:
    """Every image's captions as piece ids."""
    encode = lru_cache(maxsize=1 << 16)(tokenizer.encode)  # Captions repeat: encode each one once.
    return Captions([[encode(caption) for caption in pairs.captions(index)] for index in range(len(pairs))])
