# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.evaluation.cap_loss import caption_loss
from cogview.generation import engine
from tests.model.helpers import VOCAB, naive_caption_loss, small_model

CODES = torch.randint(0, 16, (4, 9), generator=torch.Generator().manual_seed(0))
TEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 3]]


def test_caption_loss_is_the_mean_over_the_text(monkeypatch):
    model = small_model(scale=5.0)
    expected = torch.stack([naive_caption_loss(model, *pair) for pair in zip(CODES, TEXTS, strict=True)])
    for tokens in (1, 40, 1 << 16):
        monkeypatch.setattr(engine, "SCORED_TOKENS", tokens)
        got = caption_loss(model, VOCAB, CODES, TEXTS)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_errors():
    with pytest.raises(ValueError, match="one entry per image"):
        caption_loss(small_model(), VOCAB, CODES, TEXTS[:2])
    with pytest.raises(ValueError, match="an empty one"):
        caption_loss(small_model(), VOCAB, CODES[:1], [[]])


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(default_dtype, default):
    model = small_model(scale=5.0)
    expected = caption_loss(model, VOCAB, CODES, TEXTS)
    default_dtype(default)
    got = caption_loss(model, VOCAB, CODES, TEXTS)
    assert got.dtype == caption_loss(model, VOCAB, CODES[:0], []).dtype == torch.float32
    assert torch.equal(got, expected)
