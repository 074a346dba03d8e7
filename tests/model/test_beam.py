# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

from cogview.generation.beam import beam_search
from cogview.generation.captions import generate_captions
from cogview.generation.engine import Task
from cogview.tokens.sequence import image_to_text_prompt
from tests.model.helpers import VOCAB, naive_caption_loss, small_model

CODES = torch.randint(0, 16, (6, 9), generator=torch.Generator().manual_seed(0))
SEP = VOCAB.command("SEP")


def test_with_a_beam_for_every_text_it_finds_the_best_of_all():
    model = small_model(scale=3.0)
    with torch.no_grad():
        model.word_embeddings.weight[SEP] *= -8
    letters = [VOCAB.text_start + piece for piece in range(3)]
    task = Task([range(letters[0], letters[-1] + 1), range(SEP, SEP + 1)], 3, [0] * 6, stop=SEP)
    prompts = [image_to_text_prompt(VOCAB, codes.tolist()) for codes in CODES]
    texts = [[*text, SEP] for n in range(3) for text in itertools.product(letters, repeat=n)]
    texts += [list(text) for text in itertools.product(letters, repeat=3)]
    got = beam_search(model, prompts, task, 64).tolist()
    lengths = set()
    for prompt, found in zip(prompts, got, strict=True):
        means = {}
        for text in texts:
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([prompt + text])))[0, len(prompt) - 1 : -1]
            log_p = logits[:, [*letters, SEP]].log_softmax(-1)
            chosen = log_p[range(len(text)), [[*letters, SEP].index(token) for token in text]]
            means[tuple(text)] = chosen.mean().item()
        best = max(means, key=means.__getitem__)
        end = found.index(SEP) + 1 if SEP in found else 3
        assert tuple(found[:end]) == best and set(found[end:]) <= {SEP}
        lengths.add(len(best))
    assert len(lengths) > 1


def test_more_beams_find_captions_that_are_as_likely_or_likelier():
    model = small_model(scale=3.0)
    greedy, beams = (generate_captions(model, VOCAB, CODES, max_text_tokens=6, beams=n) for n in (1, 8))
    assert greedy != beams
    losses = [
        sum(naive_caption_loss(model, codes, text).item() for codes, text in zip(CODES, texts, strict=True))
        for texts in (greedy, beams)
        if all(texts)
    ]
    assert losses == sorted(losses, reverse=True)
    alone = [generate_captions(model, VOCAB, row[None], max_text_tokens=6, beams=8)[0] for row in CODES]
    assert alone == beams


def test_errors():
    with pytest.raises(ValueError, match="beams must be a whole number from 1 to 100, got 0"):
        generate_captions(small_model(), VOCAB, CODES, beams=0)
    with pytest.raises(ValueError, match="task must have a stop"):
        beam_search(small_model(), [[1]], Task([range(3)], 2, [0]), 2)
    model = small_model()
    with torch.no_grad():
        model.word_embeddings.weight[SEP] = torch.nan
    for beams in (1, 2):
        with pytest.raises(FloatingPointError, match="not finite"):
            generate_captions(model, VOCAB, CODES, beams=beams)
