# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.config import SamplingConfig
from cogview.generation.sampling import draw, row_uniforms, token_probabilities
from cogview.generation.text_to_image import generate_codes, prefill
from cogview.model.cache import KVCache
from cogview.seeding import derive_seed
from cogview.tokens.sequence import text_to_image_prompt
from tests.model.helpers import VOCAB, small_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
SAMPLING = SamplingConfig(temperature=1.0, top_k=0)


def test_cached_steps_equal_one_full_pass():
    model = small_model(scale=5.0)
    tokens = torch.randint(0, 60, (3, 25))
    with torch.no_grad():
        expected = model(tokens)
        cache = KVCache(2, 3, 2, 30, 32)
        parts = [model(tokens[:, :7], cache=cache)]
        parts += [model(tokens[:, step : step + 1], cache=cache) for step in range(7, 20)]
        parts.append(model(tokens[:, 20:], cache=cache))  # several new tokens at once
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [25, 25, 25]


def test_prompts_of_different_lengths_share_a_batch():
    model = small_model(scale=5.0)
    rows = [text_to_image_prompt(VOCAB, prompt, 16) for prompt in PROMPTS]
    cache, hidden = prefill(model, rows, 3)
    step = torch.tensor([[3], [4], [5]])
    with torch.no_grad():
        second = model(step, cache=cache)[:, -1]
        third = model(step, cache=cache)[:, -1]
    for index, row in enumerate(rows):
        with torch.no_grad():
            alone = model(torch.tensor([[*row, *[int(step[index])] * 2]]))[0]
        n = len(row)
        for got, want in ((hidden, alone[n - 1]), (second, alone[n]), (third, alone[n + 1])):
            torch.testing.assert_close(got[index], want, rtol=1e-4, atol=1e-4)


def test_generation_equals_sampling_without_a_cache():
    model = small_model(scale=5.0)
    got = generate_codes(model, VOCAB, PROMPTS, 16, num_candidates=2, sampling=SAMPLING, seed=3)
    for prompt, pieces in enumerate(PROMPTS):
        for candidate in range(2):
            uniforms = row_uniforms([derive_seed(3, prompt, candidate)], 16)
            row = text_to_image_prompt(VOCAB, pieces, 16)
            codes = []
            for step in range(16):
                with torch.no_grad():
                    logits = model.logits(model(torch.tensor([row + codes])))[0, -1]
                logits[VOCAB.num_image_codes :] = -torch.inf
                codes.append(draw(token_probabilities(logits[None], SAMPLING), uniforms[:, step]).item())
            assert got[prompt, candidate].tolist() == codes


def test_only_image_codes_are_drawn_and_candidates_differ():
    codes = generate_codes(small_model(), VOCAB, PROMPTS, 16, num_candidates=8, sampling=SAMPLING)
    assert codes.shape == (3, 8, 16)
    assert codes.min() >= 0 and codes.max() < VOCAB.num_image_codes
    assert len(codes.flatten(0, 1).unique(dim=0)) == 24


@pytest.mark.parametrize("max_batch", [1, 2, 4, 7])
def test_batching_does_not_matter_but_the_seed_does(max_batch):
    model = small_model(scale=5.0)
    arguments = {"num_candidates": 3, "sampling": SAMPLING}
    codes = generate_codes(model, VOCAB, PROMPTS, 16, seed=1, **arguments)
    assert torch.equal(
        codes, generate_codes(model, VOCAB, PROMPTS, 16, seed=1, max_batch=max_batch, **arguments)
    )
    assert not torch.equal(codes, generate_codes(model, VOCAB, PROMPTS, 16, seed=2, **arguments))


def test_no_prompts_give_no_images():
    assert generate_codes(small_model(), VOCAB, [], 16, num_candidates=2).shape == (0, 2, 16)


def test_errors():
    model = small_model()
    with pytest.raises(ValueError, match="shorten the text by 2"):
        generate_codes(model, VOCAB, [[1] * 23], 16)
    with pytest.raises(ValueError, match="num_candidates"):
        generate_codes(model, VOCAB, PROMPTS, 16, num_candidates=0)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.train()(torch.zeros(1, 3, dtype=torch.int64), cache=KVCache(2, 1, 2, 5, 32))


def test_a_full_cache_is_an_error():
    with pytest.raises(ValueError, match="holds 4 tokens"):
        small_model()(torch.zeros(1, 5, dtype=torch.int64), cache=KVCache(2, 1, 2, 4, 32))
