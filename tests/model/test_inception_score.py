# SPDX-License-Identifier: Apache-2.0
"""The Inception Score in one pass, against its formula over all pictures at once."""

from __future__ import annotations

import pytest
import torch

from cogview.evaluation.inception_score import InceptionScore


def published(logits, splits):
    """The arithmetic of torch-fidelity 0.4.0 without shuffling."""
    logits = logits.double()
    scores = []
    for part in range(splits):
        rows = logits[part * len(logits) // splits : (part + 1) * len(logits) // splits]
        p, logs = rows.softmax(1), rows.log_softmax(1)
        scores.append((p * (logs - p.mean(0, keepdim=True).log())).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


@pytest.mark.parametrize("chunk", [1, 17, 200])
def test_the_score_is_that_of_the_published_program(chunk):
    logits = torch.randn(103, 20) * 3
    score = InceptionScore(103, splits=10)
    for part in logits.split(chunk):
        score.update(part)
    assert score.result() == pytest.approx(published(logits, 10), rel=1e-12)


def test_pictures_of_clear_and_different_things_score_their_number_and_equal_ones_score_one():
    clear = InceptionScore(40, splits=2)
    clear.update(torch.eye(4).repeat(10, 1) * 1000)
    assert clear.result() == pytest.approx((4, 0))
    equal = InceptionScore(40, splits=2)
    equal.update(torch.ones(40, 4))
    assert equal.result() == pytest.approx((1, 0))


def test_a_number_of_pictures_that_is_not_the_one_told_is_refused():
    with pytest.raises(ValueError, match="splits must be from 1 to the number of pictures 3, got 4"):
        InceptionScore(3, splits=4)
    score = InceptionScore(3, splits=1)
    score.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="2 pictures came of the 3"):
        score.result()
    with pytest.raises(ValueError, match="more pictures came than the 3"):
        score.update(torch.zeros(2, 5))
