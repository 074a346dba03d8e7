# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.evaluation.rerank import rerank
from tests.model.helpers import VOCAB, naive_caption_loss, small_model

TEXTS = [[1, 2, 3], [4]]


def test_rerank_puts_the_lowest_loss_first():
    model = small_model(scale=5.0)
    candidates = torch.randint(0, 16, (2, 5, 9))
    order, losses = rerank(model, VOCAB, TEXTS, candidates)
    for text in range(2):
        expected = [naive_caption_loss(model, codes, TEXTS[text]).item() for codes in candidates[text]]
        assert losses[text].tolist() == pytest.approx(expected, rel=1e-4)
        assert order[text].tolist() == sorted(range(5), key=lambda index, by=expected: by[index])
