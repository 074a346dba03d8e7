# SPDX-License-Identifier: Apache-2.0
"""Pictures on two grids, from which a model learns to enlarge: the low codes, then the high ones.

The high codes are those of a square of the tokenizer's size, the low ones those of the same square at half
its size. The released data builder cuts such squares out of pictures of twice the size, at a grid of three by
three places, four a picture (CogView, arXiv:2105.13290, section on super-resolution). Those places are the
windows of :mod:`cogview.generation.super_resolution`. Here each picture is shown as a whole, too.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.config import ImageTokenizerConfig
from cogview.data.order import batch_indices
from cogview.data.pairs import Pairs
from cogview.data.samples import PairSamples, Sample
from cogview.data.tokens import TokenDataset
from cogview.model.local_grid import LocalGrid
from cogview.seeding import derive_seed
from cogview.tokens.sequence import (
    ENLARGEMENT_FRAME_TOKENS,
    LOCAL_FRAME_TOKENS,
    Batch,
    enlargement_row,
    fit_text,
    local_enlargement_prefix,
    masked_codes,
)
from cogview.tokens.vqvae import ImageTokenizer

CROPS = 4  # of a picture, beside the whole of it
PLACES = 9  # three by three


def num_codes(tokenizer: ImageTokenizerConfig) -> int:
    """Low and high codes of a square. ValueError for a grid that has no quarters."""
    if tokenizer.grid % 4:
        raise ValueError(
            f"super-resolution needs a grid of codes whose side 4 divides, got {tokenizer.grid} x "
            f"{tokenizer.grid}"
        )
    return tokenizer.codes_per_image // 4 + tokenizer.codes_per_image


def encode_twice(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """Squares ``[N, 3, S, S]`` to the codes of their halves, then those of themselves."""
    return torch.cat([tokenizer.encode(part).flatten(1) for part in (F.avg_pool2d(images, 2), images)], dim=1)


class EnlargementSamples:
    """Each picture of ``pairs`` as a whole and as four crops of twice the size, one part."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.parts = ("",)
        self.num_images = (1 + CROPS) * len(pairs)
        self.left_out = pairs.absent

    def part(self, number: int, first: int) -> Iterator[Sample]:
        """See :class:`cogview.data.samples.Samples`."""
        for index in range(first, self.num_images):
            yield self._sample(*divmod(index, 1 + CROPS))

    def _sample(self, picture: int, crop: int) -> Sample:
        pairs = self.pairs
        # Neighbours take different places in turn, so that all nine occur alike.
        place = (CROPS * picture + crop - 1) % PLACES

        def read(size: int) -> Tensor:
            if crop == 0:
                return pairs.image(picture, size)
            top, left = (part * size // 2 for part in divmod(place, 3))
            return pairs.image(picture, 2 * size)[:, top : top + size, left : left + size]

        # Crops count as copies of their picture: none is validated on that another was trained on.
        origin = pairs.origin(picture) or pairs.name(picture)
        return Sample(pairs.name(picture), pairs.captions(picture), read, origin)

    def identity(self) -> Iterator[bytes]:
        """See :func:`cogview.data.fingerprint.fingerprint`."""
        yield b"enlargements"
        yield from self.pairs.identity()


class EnlargementDataset(TokenDataset):
    """Rows of a text, low codes and high codes."""

    frame_tokens = ENLARGEMENT_FRAME_TOKENS

    def row(self, text: Sequence[int], codes: Sequence[int], is_caption: bool) -> list[int]:
        """The tokens of an enlargement, whatever the order."""
        low = len(codes) // 5  # a quarter of the high ones
        return enlargement_row(self.vocab, text, codes[:low], codes[low:])


def num_local_codes(tokenizer: ImageTokenizerConfig) -> int:
    """Codes of a picture at the tokenizer's size and at twice that."""
    return 5 * tokenizer.codes_per_image


class DoubleSamples(PairSamples):
    """All of ``pairs`` at twice the size that is asked for."""

    def part(self, number: int, first: int) -> Iterator[Sample]:
        """See :class:`cogview.data.samples.Samples`."""
        for index, sample in enumerate(super().part(number, first), start=first):
            yield dataclasses.replace(sample, read=partial(self._read, index))

    def _read(self, index: int, size: int) -> Tensor:
        return self.pairs.image(index, 2 * size)

    def identity(self) -> Iterator[bytes]:
        """See :func:`cogview.data.fingerprint.fingerprint`."""
        yield b"at twice the size"
        yield from self.pairs.identity()


class LocalDataset(TokenDataset):
    """Rows of low codes, a text and high codes, of which a random share is hidden: the model fills it in.

    Source of the training by masks: MaskGIT, arXiv:2202.04200, section 3.1. Here the share of codes that are
    hidden is uniform, at least one code.
    """

    frame_tokens = LOCAL_FRAME_TOKENS
    has_grids = True

    @property
    def input_tokens(self) -> int:
        """See :class:`TokenDataset`; every token is read, as no code is predicted from those before it."""
        return self.length

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
        """See :meth:`TokenDataset.batch`; there is one order only, and all that is learned are codes."""
        choice = random.Random(derive_seed(seed, "rows", step))
        generator = torch.Generator().manual_seed(derive_seed(seed, "hidden codes", step))
        num_low = self.rows.num_codes // 5
        prefixes, high = [], []
        for index in batch_indices(seed, step, batch_size, len(self)):
            text, codes = self.rows.read(index, choice.random())
            text = (
                [] if choice.random() < text_dropout else fit_text(text, self.max_text_tokens, truncate=True)
            )
            prefixes.append(local_enlargement_prefix(self.vocab, self.max_text_tokens, text, codes[:num_low]))
            high.append(codes[num_low:])
        prefix, known = torch.tensor(prefixes, device="cpu"), torch.tensor(high, device="cpu")
        draw = partial(torch.rand, generator=generator, dtype=torch.float32, device="cpu")
        order = draw(known.shape).argsort(1)
        share = draw((len(known), 1))
        hidden = order <= share * known.shape[1]  # up to all of them, as drawing begins
        grid = LocalGrid(round(num_low**0.5), prefix.shape[1])
        tokens = torch.cat([prefix, torch.where(hidden, masked_codes(self.vocab, 2 * grid.low), known)], 1)
        targets = torch.cat([torch.full_like(prefix, self.vocab.pad), known], 1)
        weight = torch.cat([torch.zeros_like(prefix), hidden], 1).float()
        valid = tokens != self.vocab.pad
        text_mask = valid & (tokens >= self.vocab.num_image_codes)
        text_mask[:, grid.prefix :] = False
        positions = grid.positions().expand(tokens.shape)
        return Batch(tokens, targets, weight, text_mask, valid, positions, grid)
