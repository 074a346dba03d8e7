# SPDX-License-Identifier: Apache-2.0
"""How well captions match those that a picture was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CaptionMatch:
    """Means over pictures."""

    pictures: int
    exact: float  # share whose caption is one of those given
    characters: float  # 1 - edit distance / length of the longer one, to the nearest caption given


def edit_distance(first: str, second: str) -> int:
    """Characters to insert, delete or replace that make one text the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for place, one in enumerate(first, start=1):
        diagonal, row[0] = row[0], place
        for column, other in enumerate(second, start=1):
            replaced = diagonal + (one != other)
            diagonal = row[column]
            row[column] = min(replaced, diagonal + 1, row[column - 1] + 1)
    return row[-1]


def similarity(first: str, second: str) -> float:
    """1 for equal texts, 0 for texts that have no character in common in its place."""
    longer = max(len(first), len(second))
    return 1 - edit_distance(first, second) / longer if longer else 1.0


def match_captions(said: Sequence[str], given: Sequence[Sequence[str]]) -> CaptionMatch:
    """Compare a caption of each picture with the several that it was given; space at the ends is ignored.

    ValueError for none, or for another number of pictures on the two sides.
    """
    if not said or len(said) != len(given):
        raise ValueError(f"there must be as many captions as pictures, got {len(said)} and {len(given)}")
    exact, characters = 0.0, 0.0
    for text, references in zip(said, given, strict=True):
        near = max(similarity(text.strip(), reference.strip()) for reference in references)
        exact += near == 1.0
        characters += near
    return CaptionMatch(len(said), exact / len(said), characters / len(said))
