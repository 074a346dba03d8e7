# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens as training batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from cogview.data.order import batch_indices
from cogview.data.pairs import Pairs
from cogview.data.rows import CaptionLengths
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


class TokenRows(Protocol):
    """Images as codes, each with one or more texts."""

    @property
    def num_codes(self) -> int:
        """Codes of each image."""

    def __len__(self) -> int: ...

    def read(self, image: int, choice: float = 0.0) -> tuple[list[int], list[int]]:
        """Piece ids of a text of an image, and its codes; ``choice`` in [0, 1) picks the text."""


class TokenDataset:
    """Codes and tokenised captions, turned into batches of both orders.

    Args:
        length: tokens per row, padding included. A text loses what goes beyond it, an image nothing.
    """

    frame_tokens = FRAME_TOKENS  # of a row, beside text and codes
    has_grids = False  # whether its batches have a ``grid``

    def __init__(self, vocab: Vocab, rows: TokenRows, length: int) -> None:
        self.vocab, self.rows, self.length = vocab, rows, length
        self.max_text_tokens = length - self.frame_tokens - rows.num_codes
        if self.max_text_tokens < 0:
            raise ValueError(
                f"length={length} cannot hold {rows.num_codes} codes and {self.frame_tokens} framing tokens"
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def input_tokens(self) -> int:
        """Tokens of a row that the model reads: all but the last, which is only predicted."""
        return self.length - 1

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
            text, codes = self.rows.read(index, choice.random())
            is_caption = choice.random() < caption_fraction
            rows.append(self.row(fit_text(text, self.max_text_tokens, truncate=True), codes, is_caption))
        rows = drop_texts(self.vocab, rows, text_dropout, derive_seed(seed, "text dropout", step))
        return make_batch(self.vocab, rows, self.length, text_weight)

    def row(self, text: Sequence[int], codes: Sequence[int], is_caption: bool) -> list[int]:
        """The tokens of a text and an image in one of the two orders."""
        return (image_to_text_row if is_caption else text_to_image_row)(self.vocab, text, codes)


def caption_lengths(pairs: Pairs, tokenizer: TextTokenizer) -> CaptionLengths:
    """How long every image's captions are."""

    @lru_cache(maxsize=1 << 14)  # Captions repeat, above all those of the digits.
    def encoded(captions: tuple[str, ...]) -> tuple[list[int], int]:
        texts = [tokenizer.encode(caption) for caption in captions]
        return [len(text) for text in texts], sum(UNKNOWN in text for text in texts)

    lengths = CaptionLengths()
    for index in range(len(pairs)):
        lengths.add(*encoded(tuple(pairs.captions(index))))
    return lengths
