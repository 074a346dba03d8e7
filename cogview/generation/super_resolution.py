# SPDX-License-Identifier: Apache-2.0
"""Enlarges pictures to twice the side, as codes: a window at a time where they are larger than the model.

A finetuned model continues a square of ``side / 2`` low codes with the ``side`` by ``side`` codes of the same
square at twice the size. A picture of ``side / 2`` codes is one such square. Of one with ``side`` by ``side``
codes the nine windows, three by three, overlap by half. Each window keeps what earlier ones have drawn of it
and draws the rest. The one in the centre comes before those at its sides ("centre-continuous"), and most
windows stop short of their end, so that its codes are drawn with more context by the next one.

Source: CogView, arXiv:2105.13290, the section on super-resolution, and ``generation/magnify.py`` of the
released code, which has these windows for sides of 32 and does one picture at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cogview.generation.engine import DrawOptions, Task, decode, prefill
from cogview.model.transformer import CogView
from cogview.seeding import derive_seed
from cogview.tokens.sequence import enlargement_prompt
from cogview.tokens.vocab import Vocab


class Window(NamedTuple):
    """A square of high codes that is drawn at a time."""

    top: int
    left: int
    rows: int  # that are drawn, at most ``side``


class Small(NamedTuple):
    """A picture to be enlarged."""

    pieces: Sequence[int]  # its text, may be empty
    codes: Tensor  # int64 [low, low]
    seed: int = 0


def windows_of(low: int, side: int) -> list[Window]:
    """The windows, in order, that enlarge ``low`` by ``low`` codes; the model draws ``side`` by ``side``.

    ValueError unless ``low`` is ``side / 2`` (one window) or ``side`` (nine), and 4 divides ``side``.
    """
    if side % 4:
        raise ValueError(f"super-resolution needs a grid of codes whose side 4 divides, got {side}")
    if 2 * low == side:
        return [Window(0, 0, side)]
    if low != side:
        raise ValueError(f"codes must be {side // 2} x {side // 2} or {side} x {side}, got {low} x {low}")
    step, margin = side // 2, max(1, side // 16)
    first, most = step + margin, side - margin
    order = (
        *((0, 0, first), (0, 1, most), (0, 2, most)),
        *((1, 1, most), (1, 0, most), (1, 2, most)),
        *((2, 0, side), (2, 1, side), (2, 2, side)),
    )
    return [Window(step * i, step * j, rows) for i, j, rows in order]


@torch.no_grad()
def enlarge(
    model: CogView, vocab: Vocab, pictures: Sequence[Small], side: int, options: DrawOptions
) -> Tensor:
    """The codes of ``pictures``, all of one size, at twice the side; int64 ``[N, 2 low, 2 low]``.

    A picture's outcome depends on its codes, text and seed, not on the other pictures. ``options.seed``
    plays no part. ``options.on_step`` hears of :func:`codes_to_draw` codes a picture. Leaves the model in
    eval mode. Raises what :func:`windows_of` raises.
    """
    model.eval()
    low = pictures[0].codes.shape[0]
    windows = windows_of(low, side)
    device = model.word_embeddings.weight.device
    high = torch.full((len(pictures), 2 * low, 2 * low), -1, device=device)
    together = max(1, options.max_batch // options.sampling.branches)
    for number, window in enumerate(windows):
        for first in range(0, len(pictures), together):
            part = pictures[first : first + together]
            seeds = [derive_seed(picture.seed, "window", number) for picture in part]
            area = high[first : first + together, window.top :, window.left :][:, : window.rows, :side]
            area.copy_(_draw(model, vocab, _Squares(part, window, side, area, seeds), options))
    return high


def codes_to_draw(low: int, side: int) -> int:
    """How many codes :func:`enlarge` goes through for a picture, those included that it keeps."""
    return sum(window.rows * side for window in windows_of(low, side))


def drawn_by(low: int, side: int) -> Tensor:
    """The number of the window that draws each code, int64 ``[2 low, 2 low]``."""
    numbers = torch.full((2 * low, 2 * low), -1, device="cpu")
    for number, (top, left, rows) in enumerate(windows_of(low, side)):
        area = numbers[top : top + rows, left : left + side]
        area[area < 0] = number
    return numbers


class _Squares(NamedTuple):
    """One window of several pictures."""

    pictures: Sequence[Small]
    window: Window
    side: int
    known: Tensor  # int64 [N, rows, side], -1 where a code is to be drawn
    seeds: Sequence[int]

    def prompts(self, vocab: Vocab, with_text: bool) -> Iterator[list[int]]:
        top, left, _ = self.window
        area = (slice(top // 2, (top + self.side) // 2), slice(left // 2, (left + self.side) // 2))
        for picture in self.pictures:
            codes = picture.codes[area].flatten().tolist()
            yield enlargement_prompt(vocab, picture.pieces if with_text else (), codes, self.side**2)


def _draw(model: CogView, vocab: Vocab, squares: _Squares, options: DrawOptions) -> Tensor:
    """The codes of a window, int64 ``[N, rows, side]``."""
    known = squares.known.flatten(1)
    # What is known at the beginning of every window need not be drawn code by code.
    ahead = int((known >= 0).all(0).long().cumprod(0).sum())
    prompts = list(squares.prompts(vocab, True))
    begun = known[:, :ahead].tolist()
    if options.sampling.guidance != 1:
        prompts, begun = [*prompts, *squares.prompts(vocab, False)], begun * 2
    if ahead and options.on_step is not None:
        options.on_step(ahead * len(known))
    num_tokens = known.shape[1] - ahead
    prompts = [[*prompt, *codes] for prompt, codes in zip(prompts, begun, strict=True)]
    restart = vocab.command("ROI2")
    rows = prefill(model, prompts, num_tokens, spare=options.parallel - 1, restart=restart)
    task = Task(
        allowed=[range(vocab.num_image_codes)],
        num_tokens=num_tokens,
        seeds=squares.seeds,
        given=known[:, ahead:],
        first=ahead,
    )
    drawn = decode(model, rows, task, options)
    return torch.cat([known[:, :ahead], drawn], dim=1).view(squares.known.shape)
