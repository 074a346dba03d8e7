# SPDX-License-Identifier: Apache-2.0
"""Captions against those that were given, exactly and by characters."""

from __future__ import annotations

import pytest

from cogview.evaluation.caption_match import edit_distance, match_captions, similarity


@pytest.mark.parametrize(
    ("first", "second", "edits"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("同样", "同样", 0), ("ab", "ba", 2)],
)
def test_edit_distance(first, second, edits):
    assert edit_distance(first, second) == edit_distance(second, first) == edits


def test_the_nearest_caption_counts():
    match = match_captions(["a seven ", "a one", ""], [["the seven", "a seven"], ["a two"], ["xy"]])
    assert match.pictures == 3
    assert match.exact == pytest.approx(1 / 3)
    # "a one" to "a two": o inserted or replaced, n, e: three of five characters.
    assert match.characters == pytest.approx((1 + (1 - 3 / 5) + 0) / 3)
    assert similarity("", "") == 1


def test_no_captions_are_refused():
    with pytest.raises(ValueError, match="as many captions as pictures"):
        match_captions(["a"], [])
