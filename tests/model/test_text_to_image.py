# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.config import SamplingConfig
from cogview.generation.engine import DrawOptions
from cogview.generation.sampling import Noise, choose
from cogview.generation.text_to_image import generate_codes
from cogview.model.cache import KVCache
from cogview.seeding import derive_seed
from cogview.tokens.sequence import text_to_image_prompt
from tests.model.helpers import VOCAB, small_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
SAMPLING = SamplingConfig(temperature=1.0, top_k=0)


def test_generation_equals_sampling_without_a_cache():
    model = small_model(scale=5.0)
    got = generate_codes(model, VOCAB, PROMPTS, 16, num_candidates=2, options=DrawOptions(SAMPLING, seed=3))
    for prompt, pieces in enumerate(PROMPTS):
        for candidate in range(2):
            noise = Noise(torch.tensor([derive_seed(3, candidate)]), 16, VOCAB.num_image_codes)
            row = text_to_image_prompt(VOCAB, pieces, 16)
            codes = []
            for step in range(16):
                with torch.no_grad():
                    logits = model.logits(model(torch.tensor([row + codes])))[0, -1]
                allowed = logits[None, None, : VOCAB.num_image_codes]
                codes.append(choose(allowed, SAMPLING, noise, torch.tensor([[step]])).item())
            assert got[prompt, candidate].tolist() == codes


def test_only_image_codes_are_drawn_and_candidates_differ():
    codes = generate_codes(small_model(), VOCAB, PROMPTS, 16, num_candidates=8, options=DrawOptions(SAMPLING))
    assert codes.shape == (3, 8, 16)
    assert codes.min() >= 0 and codes.max() < VOCAB.num_image_codes
    assert [len(of_prompt.unique(dim=0)) for of_prompt in codes] == [8, 8, 8]


@pytest.mark.parametrize("max_batch", [1, 2, 4, 7])
def test_batching_does_not_matter_but_the_seed_does(max_batch):
    model = small_model(scale=5.0)

    def codes(seed, max_batch):
        options = DrawOptions(SAMPLING, seed, max_batch)
        return generate_codes(model, VOCAB, PROMPTS, 16, num_candidates=3, options=options)

    assert torch.equal(codes(1, 256), codes(1, max_batch))
    assert not torch.equal(codes(1, 256), codes(2, 256))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(default_dtype, default):
    model = small_model(scale=5.0)
    options = DrawOptions(SAMPLING, seed=1)
    expected = generate_codes(model, VOCAB, PROMPTS, 16, options=options)
    default_dtype(default)
    assert torch.equal(generate_codes(model, VOCAB, PROMPTS, 16, options=options), expected)


def test_each_step_reports_the_tokens_it_drew():
    reported = []
    options = DrawOptions(SAMPLING, max_batch=4, on_step=reported.append)
    generate_codes(small_model(), VOCAB, PROMPTS, 16, num_candidates=3, options=options)
    assert sum(reported) == 3 * 3 * 16


def test_no_prompts_give_no_images():
    assert generate_codes(small_model(), VOCAB, [], 16, num_candidates=2).shape == (0, 2, 16)


def test_errors():
    model = small_model()
    with pytest.raises(ValueError, match="shorten the text by 2"):
        generate_codes(model, VOCAB, [[1] * 23], 16)
    with pytest.raises(ValueError, match="num_candidates"):
        generate_codes(model, VOCAB, PROMPTS, 16, num_candidates=0)
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        DrawOptions(max_batch=0)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.train()(
            torch.zeros(1, 3, dtype=torch.int64),
            cache=KVCache(num_layers=2, batch=1, num_heads=2, capacity=5, head_size=32),
        )
