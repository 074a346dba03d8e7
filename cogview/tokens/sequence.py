# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens: which token stands where, what each step's loss weighs, which keys are text.

Templates of the released code (CogView, arXiv:2105.13290)::

    text to image    ROI1 text SIZE BOI1 codes EOI1                 PAD ...
    image to text    SIZE BOI1 codes EOI1 ROI1 text SEP             PAD ...

The released captioner has no end token and always emits 20 text tokens; rows trained here end with SEP
so that a caption can stop by itself. Positions are absolute and count from the start of the row.
Letters: B rows, T inputs per row (one fewer than tokens).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogview.tokens.vocab import Vocab

FRAME_TOKENS = 5  # ROI1, SIZE, BOI1, EOI1 and, in image-to-text order, SEP


def _text_ids(vocab: Vocab, pieces: Sequence[int]) -> list[int]:
    if pieces and not 0 <= min(pieces) <= max(pieces) < vocab.num_text_pieces:
        raise ValueError(f"pieces must be in [0, {vocab.num_text_pieces}), got {min(pieces)}..{max(pieces)}")
    return [vocab.text_start + piece for piece in pieces]


def _image_ids(vocab: Vocab, codes: Sequence[int]) -> list[int]:
    if codes and not 0 <= min(codes) <= max(codes) < vocab.num_image_codes:
        raise ValueError(f"codes must be in [0, {vocab.num_image_codes}), got {min(codes)}..{max(codes)}")
    return list(codes)


def text_to_image_prompt(vocab: Vocab, pieces: Sequence[int], num_codes: int) -> list[int]:
    """``ROI1 text SIZE BOI1``, after which ``num_codes`` image codes are to be generated."""
    text = _text_ids(vocab, pieces)
    return [vocab.command("ROI1"), *text, vocab.size_token(num_codes), vocab.command("BOI1")]


def text_to_image_row(vocab: Vocab, pieces: Sequence[int], codes: Sequence[int]) -> list[int]:
    """``ROI1 text SIZE BOI1 codes EOI1`` from piece ids and codebook indices."""
    prompt = text_to_image_prompt(vocab, pieces, len(codes))
    return [*prompt, *_image_ids(vocab, codes), vocab.command("EOI1")]


def image_to_text_prompt(vocab: Vocab, codes: Sequence[int]) -> list[int]:
    """``SIZE BOI1 codes EOI1 ROI1``, after which text is to be generated or scored."""
    image = _image_ids(vocab, codes)
    frame = [vocab.size_token(len(codes)), vocab.command("BOI1")]
    return [*frame, *image, vocab.command("EOI1"), vocab.command("ROI1")]


def image_to_text_row(vocab: Vocab, pieces: Sequence[int], codes: Sequence[int]) -> list[int]:
    """``SIZE BOI1 codes EOI1 ROI1 text SEP`` from piece ids and codebook indices."""
    return [*image_to_text_prompt(vocab, codes), *_text_ids(vocab, pieces), vocab.command("SEP")]


def drop_texts(vocab: Vocab, rows: Sequence[Sequence[int]], share: float, seed: int) -> list[list[int]]:
    """The rows, of which ``share`` of those in text-to-image order lose their text; each falls to chance.

    A model that has seen such rows can be guided: it knows what pictures are like without a text.
    """
    chance = random.Random(seed)
    return [_without_text(vocab, row) if chance.random() < share else list(row) for row in rows]


def _without_text(vocab: Vocab, row: Sequence[int]) -> list[int]:
    if row[0] != vocab.command("ROI1"):
        return list(row)
    is_text = range(vocab.text_start, vocab.command_start)
    return [token for token in row if token not in is_text]


def fit_text(pieces: Sequence[int], max_text_tokens: int, *, truncate: bool = False) -> list[int]:
    """The pieces, at most ``max_text_tokens`` of them.

    A longer text is a ValueError, or loses its end if ``truncate``. (The released loader cuts the end
    of the row instead, which costs the image its last codes.)
    """
    if len(pieces) <= max_text_tokens:
        return list(pieces)
    if truncate:
        return list(pieces[:max_text_tokens])
    raise ValueError(f"the text has {len(pieces)} tokens, at most {max_text_tokens} fit; shorten it")


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model. All ``[B, T]``.

    ``weight`` is the loss weight of each step and goes by its *input* token: 1 after an image code,
    ``text_weight`` after any other token, 0 where the target is PAD. So BOI1 -> first code counts as
    text, and last code -> EOI1 as image, as in the released code.
    """

    tokens: Tensor  # int64 inputs
    targets: Tensor  # int64, the inputs shifted by one
    weight: Tensor  # float32
    text_mask: Tensor  # bool: input is neither image code nor PAD, hence always a pivot
    valid_mask: Tensor  # bool: input is not PAD

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; the host does not wait for a copy to a GPU."""
        tensors = [self.tokens, self.targets, self.weight, self.text_mask, self.valid_mask]
        if torch.device(device).type == "cuda":
            # Only from pinned memory does a copy run beside the host.
            tensors = [tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors]
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))

    def split(self, parts: int) -> list[Batch]:
        """The rows in order, in ``parts`` batches that differ by one row at most."""
        tensors = (self.tokens, self.targets, self.weight, self.text_mask, self.valid_mask)
        pieces = [tensor.tensor_split(parts) for tensor in tensors]
        return [Batch(*part) for part in zip(*pieces, strict=True)]


def make_batch(vocab: Vocab, rows: Sequence[Sequence[int]], length: int, text_weight: float = 1.0) -> Batch:
    """Pad rows to ``length`` tokens and shift; T is ``length - 1``. A longer row is a ValueError."""
    longest = max(len(row) for row in rows)
    if longest > length:
        raise ValueError(
            f"rows must have at most length={length} tokens, got one of {longest}; shorten its text"
        )
    table = np.full(
        (len(rows), length), vocab.pad, dtype=np.int64
    )  # NumPy reads lists several times as fast.
    for row, tokens in zip(table, rows, strict=True):
        row[: len(tokens)] = tokens
    padded = torch.from_numpy(table)
    inputs, targets = padded[:, :-1].contiguous(), padded[:, 1:].contiguous()
    image = inputs < vocab.num_image_codes
    valid = inputs != vocab.pad
    one, text = torch.tensor([1.0, text_weight], dtype=torch.float32)
    weight = torch.where(image, one, text) * (targets != vocab.pad)
    return Batch(inputs, targets, weight, valid & ~image, valid)
