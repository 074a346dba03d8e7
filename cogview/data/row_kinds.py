# SPDX-License-Identifier: Apache-2.0
"""What the rows of a training hold of each picture: its codes, or codes on two grids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cogview.config import ImageTokenizerConfig
from cogview.data import enlargements
from cogview.data.pairs import Pairs
from cogview.data.row_writer import Encode, encode_whole
from cogview.data.samples import PairSamples, Samples
from cogview.data.tokens import TokenDataset


@dataclass(frozen=True)
class RowKind:
    """From pictures with captions to rows, and from rows to batches."""

    samples: Callable[[Pairs], Samples]
    encode: Encode
    num_codes: Callable[[ImageTokenizerConfig], int]  # of a row
    dataset: type[TokenDataset]

    def row_length(self, tokenizer: ImageTokenizerConfig, max_text_tokens: int) -> int:
        """Tokens of a row, padding included."""
        return self.dataset.frame_tokens + max_text_tokens + self.num_codes(tokenizer)


PICTURES = RowKind(PairSamples, encode_whole, lambda tokenizer: tokenizer.codes_per_image, TokenDataset)
ENLARGEMENTS = RowKind(
    enlargements.EnlargementSamples,
    enlargements.encode_twice,
    enlargements.num_codes,
    enlargements.EnlargementDataset,
)
LOCAL_ENLARGEMENTS = RowKind(
    enlargements.DoubleSamples,
    enlargements.encode_twice,
    enlargements.num_local_codes,
    enlargements.LocalDataset,
)
