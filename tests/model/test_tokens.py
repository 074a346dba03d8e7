# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.data.tokens import TokenDataset
from cogview.tokens.vocab import Vocab


def test_batches_follow_from_seed_and_step():
    vocab = Vocab(16, 20)
    dataset = TokenDataset(vocab, torch.arange(40).view(10, 4) % 16, [[[1], [2, 3]]] * 10, length=11)
    options = {"text_weight": 2.0, "caption_fraction": 0.5, "seed": 1}
    batch = dataset.batch(4, 64, **options)
    assert torch.equal(batch.tokens, dataset.batch(4, 64, **options).tokens)
    assert not torch.equal(batch.tokens, dataset.batch(5, 64, **options).tokens)
    first = batch.tokens[:, 0]
    is_caption = first == vocab.command("TINY")
    assert torch.all(is_caption | (first == vocab.command("ROI1")))
    assert 16 < is_caption.sum() < 48
    only = dataset.batch(4, 64, text_weight=1.0, caption_fraction=0.0, seed=1).tokens[:, 0]
    assert torch.all(only == vocab.command("ROI1"))
    dropping = dataset.batch(4, 64, **options, text_dropout=0.5)
    others = (dropping.tokens != batch.tokens).any(1)
    assert 8 < others.sum() < 40 and not (others & is_caption).any()
    assert torch.equal(dropping.tokens[others, 1], torch.full((int(others.sum()),), vocab.command("TINY")))


def test_rows_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="longest text of 3 tokens"):
        TokenDataset(Vocab(16, 20), torch.zeros(1, 4, dtype=torch.int64), [[[1, 2, 3]]], length=11)
