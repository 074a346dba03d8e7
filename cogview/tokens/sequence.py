# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens: which token stands where, what each step's loss weighs, which keys are text.

Templates of the released code (CogView, arXiv:2105.13290)::

    text to image    ROI1 text SIZE BOI1 codes EOI1                 PAD ...
    image to text    SIZE BOI1 codes EOI1 ROI1 text SEP             PAD ...
    enlargement      ROI1 text SIZE BOI1 low EOI1 ROI2 POS0 SIZE BOI2 high EOI2    PAD ...

and for CogView2's attention, whose rows have fixed places (see ``LocalGrid``)::

    local            SIZE BOI1 low EOI1 ROI1 text PAD ...  high

In an enlargement both SIZE tokens are that of the high codes, and POS0 never varies, as in the released code.
The released captioner has no end token and always emits 20 text tokens; rows trained here end with SEP
so that a caption can stop by itself. Positions are absolute and count from the start of the row, and from 0
again at ROI2.
Letters: B rows, T inputs per row (one fewer than tokens).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogview.tokens.vocab import Vocab

LOCAL_FRAME_TOKENS = 4  # SIZE, BOI1, EOI1, ROI1
FRAME_TOKENS = 5  # ROI1, SIZE, BOI1, EOI1 and, in image-to-text order, SEP
ENLARGEMENT_FRAME_TOKENS = 9  # ROI1, SIZE, BOI1, EOI1, ROI2, POS0, SIZE, BOI2, EOI2


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


def enlargement_prompt(vocab: Vocab, pieces: Sequence[int], low: Sequence[int], num_codes: int) -> list[int]:
    """``ROI1 text SIZE BOI1 low EOI1 ROI2 POS0 SIZE BOI2``, after which ``num_codes`` codes are generated."""
    size = vocab.size_token(num_codes)
    before = [vocab.command("ROI1"), *_text_ids(vocab, pieces), size, vocab.command("BOI1")]
    between = [vocab.command("EOI1"), vocab.command("ROI2"), vocab.command("POS0"), size]
    return [*before, *_image_ids(vocab, low), *between, vocab.command("BOI2")]


def enlargement_row(
    vocab: Vocab, pieces: Sequence[int], low: Sequence[int], high: Sequence[int]
) -> list[int]:
    """``ROI1 text SIZE BOI1 low EOI1 ROI2 POS0 SIZE BOI2 high EOI2``: one picture on two grids."""
    prompt = enlargement_prompt(vocab, pieces, low, len(high))
    return [*prompt, *_image_ids(vocab, high), vocab.command("EOI2")]


def local_enlargement_prefix(vocab: Vocab, room: int, pieces: Sequence[int], low: Sequence[int]) -> list[int]:
    """``SIZE BOI1 low EOI1 ROI1 text PAD ...`` with ``room`` tokens for the text; high codes follow."""
    row = [*image_to_text_prompt(vocab, low), *_text_ids(vocab, pieces)]
    return [*row, *[vocab.pad] * (room - len(pieces))]


def masked_codes(vocab: Vocab, side: int) -> Tensor:
    """What stands for codes of a fine grid that are not known, int64 ``[side * side]``.

    POS1 to POS4 tell the four codes apart that lie over one coarse code and share its position.
    """
    x = torch.arange(side, device="cpu") % 2
    return (vocab.command("POS1") + 2 * x[:, None] + x).flatten()


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
    positions: Tensor | None = None  # int64 ids of positions; None: every input's place in its row
    grid: Any = None  # the model's ``LocalGrid``, if rows hold a coarse and a fine grid of one picture

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; the host does not wait for a copy to a GPU."""
        is_cuda = torch.device(device).type == "cuda"

        def moved(tensor: Tensor | None) -> Any:
            if tensor is None:
                return None
            # Only from pinned memory does a copy run beside the host.
            tensor = tensor.pin_memory() if is_cuda and not tensor.is_cuda else tensor
            return tensor.to(device, non_blocking=True)

        return replace(Batch(*map(moved, self._tensors())), grid=self.grid)

    def _tensors(self) -> tuple[Any, ...]:
        return (self.tokens, self.targets, self.weight, self.text_mask, self.valid_mask, self.positions)

    def split(self, parts: int) -> list[Batch]:
        """The rows in order, in ``parts`` batches that differ by one row at most."""
        pieces: list[Any] = [
            (None,) * parts if tensor is None else tensor.tensor_split(parts) for tensor in self._tensors()
        ]
        return [replace(Batch(*part), grid=self.grid) for part in zip(*pieces, strict=True)]


def drop_codes(vocab: Vocab, batch: Batch, share: float, seed: int) -> Batch:
    """The batch with image codes hidden: MASK stands for them in the inputs. What is to be predicted stays.

    ``share`` of the rows, each by chance, lose codes, and such a row a share of them that is uniform in
    [0, 1). Codes before a code tell more about it than the text does, so a model of few pictures learns
    pictures by heart and hardly reads; where they are hidden, it has nothing but the text. Source: the word
    dropout of Bowman et al., arXiv:1511.06349, section 3.1, there against a decoder that ignores its input.

    In a row of two grids the low codes stay, since the high ones are drawn from them.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = (batch.tokens.shape[0], 1)
    draw = partial(torch.rand, generator=generator, dtype=torch.float32, device="cpu")
    of_row, is_hit, chance = draw(rows), draw(rows) < share, draw(batch.tokens.shape)
    hidden = is_hit & (chance < of_row) & (batch.tokens < vocab.num_image_codes)
    restarts = batch.tokens == vocab.command("ROI2")
    hidden &= (restarts.cumsum(1) > 0) | ~restarts.any(1, keepdim=True)
    return replace(batch, tokens=batch.tokens.masked_fill(hidden, vocab.command("MASK")))


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
    one, text = torch.tensor([1.0, text_weight], dtype=torch.float32, device="cpu")
    weight = torch.where(image, one, text) * (targets != vocab.pad)
    positions = _positions(inputs, vocab.command("ROI2"))
    return Batch(inputs, targets, weight, valid & ~image, valid, positions)


def _positions(tokens: Tensor, restart: int) -> Tensor | None:
    """Places ``[B, T]`` that count from 0 again at the token ``restart``; None if no row has it."""
    is_after = (tokens == restart).cumsum(1) > 0
    if not bool(is_after.any()):
        return None
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return torch.where(is_after, places - (~is_after).sum(1, keepdim=True), places)
