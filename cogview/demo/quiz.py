# SPDX-License-Identifier: Apache-2.0
"""What a run on built-in data is asked for, who says whether a drawing is right, and the real pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogview.data.pairs import Pairs
from cogview.demo.run import Asked

TOGETHER = 256  # real pictures that are read at once


@dataclass(frozen=True)
class Quiz:
    """Prompts with a judge that never sees a generated picture before."""

    prompts: Sequence[Asked]
    is_right: Callable[[int, Tensor], Tensor]  # place of a prompt, pictures [M, 3, S, S]: bool [M]
    pictures: Pairs  # the real ones
    side: int  # in pixels

    def real(self) -> Iterator[Tensor]:
        """The real pictures, ``[n, 3, side, side]`` in [0, 1]."""
        for start in range(0, len(self.pictures), TOGETHER):
            numbers = range(start, min(start + TOGETHER, len(self.pictures)))
            yield torch.stack([self.pictures.image(number, self.side) for number in numbers])


def quiz_of(data: str, side: int, most: int) -> Quiz:
    """The quiz for built-in data, with at most so many prompts. ValueError for data that no judge knows."""
    known = {"digits": _digits, "emoji": _emoji}
    if data not in known:
        raise ValueError(
            f"run must be one on {' or '.join(known)}, whose pictures a judge can read, got one on {data}"
        )
    return known[data](side, most)


def _digits(side: int, most: int) -> Quiz:
    """Held-out phrasings of all digits, again and again until there are enough of them."""
    from cogview.data.digits import DigitPairs
    from cogview.demo.judge import Judge
    from cogview.demo.report import all_prompts

    once = len(all_prompts(1))
    prompts, judge = all_prompts(-(-most // once))[:most], Judge()

    def is_right(place: int, images: Tensor) -> Tensor:
        return judge(images) == prompts[place].digit

    return Quiz(prompts, is_right, DigitPairs("train"), side)


def _emoji(side: int, most: int) -> Quiz:
    """Held-out combinations whose real picture the judge reads right; drawing and tone must be right."""
    from cogview.data.emoji import EmojiPairs, held_out_combinations, training_pairs
    from cogview.demo.emoji import GROUPS, all_prompts
    from cogview.evaluation.emoji_judge import EmojiJudge

    judge, held_out = EmojiJudge(side), held_out_combinations()
    found, expected = judge.real(held_out), judge.expected(held_out)
    readable = (found.tones == expected.tones) & (found.drawings == expected.drawings)
    can_read = dict(zip(held_out.pictures, readable.tolist(), strict=True))
    prompts = [p for p in all_prompts() if p.group == GROUPS[0] and can_read[p.picture]][:most]
    wanted = judge.expected(EmojiPairs([prompt.picture for prompt in prompts]))

    def is_right(place: int, images: Tensor) -> Tensor:
        seen = judge(images)
        return (seen.tones == wanted.tones[place]) & (seen.drawings == wanted.drawings[place])

    coloured = [picture for picture in training_pairs().pictures if picture.style == "color"]
    return Quiz(prompts, is_right, EmojiPairs(coloured), side)
