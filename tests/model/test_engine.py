# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.generation.engine import prefill
from cogview.model.cache import KVCache
from cogview.tokens.sequence import text_to_image_prompt
from tests.model.helpers import VOCAB, small_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


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


def test_a_full_cache_is_an_error():
    with pytest.raises(ValueError, match="holds 4 tokens"):
        small_model()(torch.zeros(1, 5, dtype=torch.int64), cache=KVCache(2, 1, 2, 4, 32))
