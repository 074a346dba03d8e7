# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from cogview.evaluation.rerank import rerank
from cogview.generation.captions import caption_loss, generate_captions
from cogview.tokens.sequence import image_to_text_prompt
from tests.model.helpers import VOCAB, small_model

CODES = torch.randint(0, 16, (4, 9), generator=torch.Generator().manual_seed(0))
TEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 3]]


def naive_caption_loss(model, codes, text):
    """Mean over the text, log-softmax over all but image ids, one row at a time."""
    prompt = image_to_text_prompt(VOCAB, codes.tolist())
    ids = [VOCAB.text_start + piece for piece in text]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([prompt + ids])))[0]
    logits[:, : VOCAB.num_image_codes] = -torch.inf
    first = len(prompt) - 1
    return F.cross_entropy(logits[first : first + len(ids)], torch.tensor(ids))


def test_caption_loss_is_the_mean_over_the_text():
    model = small_model(scale=5.0)
    expected = torch.stack([naive_caption_loss(model, *pair) for pair in zip(CODES, TEXTS, strict=True)])
    for max_batch in (1, 3, 256):
        got = caption_loss(model, VOCAB, CODES, TEXTS, max_batch=max_batch)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_rerank_puts_the_lowest_loss_first():
    model = small_model(scale=5.0)
    candidates = torch.randint(0, 16, (2, 5, 9))
    order, losses = rerank(model, VOCAB, TEXTS[:2], candidates)
    for text in range(2):
        expected = [naive_caption_loss(model, codes, TEXTS[text]).item() for codes in candidates[text]]
        assert losses[text].tolist() == pytest.approx(expected, rel=1e-4)
        assert order[text].tolist() == sorted(range(5), key=lambda index, by=expected: by[index])


def test_captions_are_greedy_text_up_to_sep():
    model = small_model(scale=5.0)
    got = generate_captions(model, VOCAB, CODES, max_text_tokens=7)
    sep = VOCAB.command("SEP")
    allowed = [*range(VOCAB.text_start, VOCAB.command_start), sep]
    for codes, pieces in zip(CODES, got, strict=True):
        row = image_to_text_prompt(VOCAB, codes.tolist())
        expected = []
        for _ in range(7):
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([row])))[0, -1]
            token = max(allowed, key=lambda index, by=logits: by[index])
            if token == sep:
                break
            expected.append(token - VOCAB.text_start)
            row = [*row, token]
        assert pieces == expected


def test_a_caption_stops_at_sep():
    model = small_model()
    with torch.no_grad():
        sep = VOCAB.command("SEP")
        model.word_embeddings.weight[sep] = 100 * torch.sign(model.transformer.final_layernorm.bias)
        model.transformer.final_layernorm.bias.mul_(100)
    assert generate_captions(model, VOCAB, CODES) == [[], [], [], []]


def test_errors():
    with pytest.raises(ValueError, match="one entry per image"):
        caption_loss(small_model(), VOCAB, CODES, TEXTS[:2])
    with pytest.raises(ValueError, match="an empty one"):
        caption_loss(small_model(), VOCAB, CODES[:1], [[]])
