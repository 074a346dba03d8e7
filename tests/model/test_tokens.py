# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest
import torch

from cogview.data.rows import Rows
from cogview.data.tokens import TokenDataset
from cogview.tokens.vocab import Vocab

VOCAB = Vocab(16, 20)
OPTIONS = {"text_weight": 2.0, "caption_fraction": 0.5, "seed": 1}


@pytest.fixture
def dataset():
    rows = Rows.in_memory(VOCAB, torch.arange(40).view(10, 4) % 16, [[[1], [2, 3]]] * 10)
    return TokenDataset(VOCAB, rows, length=11)


def test_batches_follow_from_seed_and_step(dataset):
    batch = dataset.batch(4, 64, **OPTIONS)
    assert torch.equal(batch.tokens, dataset.batch(4, 64, **OPTIONS).tokens)
    assert not torch.equal(batch.tokens, dataset.batch(5, 64, **OPTIONS).tokens)
    first = batch.tokens[:, 0]
    is_caption = first == VOCAB.command("TINY")
    assert torch.all(is_caption | (first == VOCAB.command("ROI1")))
    assert 16 < is_caption.sum() < 48
    only = dataset.batch(4, 64, text_weight=1.0, caption_fraction=0.0, seed=1).tokens
    assert torch.all(only[:, 0] == VOCAB.command("ROI1"))
    of_two = only[:, 1] == VOCAB.text_start + 2
    assert 16 < of_two.sum() < 48  # images have two captions, drawn equally often
    dropping = dataset.batch(4, 64, **OPTIONS, text_dropout=0.5)
    others = (dropping.tokens != batch.tokens).any(1)
    assert 8 < others.sum() < 40 and not (others & is_caption).any()
    assert torch.all(dropping.tokens[others, 1] == VOCAB.command("TINY"))


def test_another_process_makes_the_same_batches(dataset):
    other = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(other.batch(4, 64, **OPTIONS).tokens, dataset.batch(4, 64, **OPTIONS).tokens)


def test_a_text_too_long_loses_its_end_and_the_image_nothing():
    rows = Rows.in_memory(VOCAB, torch.tensor([[1, 2, 3, 4]]), [[[5, 6, 7]]])
    batch = TokenDataset(VOCAB, rows, length=11).batch(0, 1, text_weight=1.0, caption_fraction=0.0, seed=0)
    kept = [VOCAB.text_start + 5, VOCAB.text_start + 6]
    tiny, start, end = (VOCAB.command(name) for name in ("TINY", "BOI1", "EOI1"))
    assert batch.targets[0].tolist() == [*kept, tiny, start, 1, 2, 3, 4, end, VOCAB.pad]


def test_rows_that_cannot_hold_an_image_are_an_error():
    rows = Rows.in_memory(VOCAB, torch.zeros(1, 4, dtype=torch.int64), [[[1]]])
    with pytest.raises(ValueError, match="length=8 cannot hold 4 codes and 5 framing tokens"):
        TokenDataset(VOCAB, rows, length=8)
