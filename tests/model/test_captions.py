# SPDX-License-Identifier: Apache-2.0
import torch

from cogview.config import SamplingConfig
from cogview.generation.captions import generate_captions
from cogview.generation.engine import DrawOptions
from cogview.generation.sampling import Noise, choose
from cogview.seeding import derive_seed
from cogview.tokens.sequence import image_to_text_prompt
from tests.model.helpers import VOCAB, small_model

CODES = torch.randint(0, 16, (4, 9), generator=torch.Generator().manual_seed(0))
SAMPLING = SamplingConfig(temperature=1.0, top_k=0)


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


def test_batching_does_not_matter_but_the_seed_does():
    model = small_model(scale=5.0)

    def captions(seed, max_batch):
        options = DrawOptions(SAMPLING, seed, max_batch)
        return generate_captions(model, VOCAB, CODES, max_text_tokens=7, options=options)

    assert captions(1, 256) == captions(1, 3) == captions(1, 1)
    assert captions(1, 256) != captions(2, 256)


def test_drawn_captions_equal_sampling_without_a_cache():
    model = small_model(scale=5.0)
    got = generate_captions(model, VOCAB, CODES, max_text_tokens=7, options=DrawOptions(SAMPLING, seed=3))
    allowed = [*range(VOCAB.text_start, VOCAB.command_start), VOCAB.command("SEP")]
    noise = Noise(torch.tensor([derive_seed(3, "caption")]), 7, len(allowed))
    for codes, pieces in zip(CODES, got, strict=True):
        row = image_to_text_prompt(VOCAB, codes.tolist())
        expected = []
        for step in range(7):
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([row])))[:, -1:, allowed]
            token = allowed[choose(logits, SAMPLING, noise, torch.tensor([[step]])).item()]
            if token == VOCAB.command("SEP"):
                break
            expected.append(token - VOCAB.text_start)
            row = [*row, token]
        assert pieces == expected


def test_no_images_give_no_captions():
    assert generate_captions(small_model(), VOCAB, CODES[:0]) == []
