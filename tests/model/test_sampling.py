# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.config import SamplingConfig
from cogview.generation.sampling import draw, row_uniforms, token_probabilities, top_k_filter, top_p_filter
from cogview.seeding import derive_seed

LOGITS = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]]).log()


def kept(logits):
    return [[i for i, value in enumerate(row) if value > -torch.inf] for row in logits.tolist()]


def test_top_k_works_row_by_row_and_keeps_ties():
    assert kept(top_k_filter(LOGITS, 2)) == [[1, 2], [0, 1, 2, 3]]
    assert kept(top_k_filter(LOGITS, 1)) == [[1], [0]]
    assert torch.equal(top_k_filter(LOGITS, 0), LOGITS)
    assert torch.equal(top_k_filter(LOGITS, 9), LOGITS)


def test_top_p_works_row_by_row():
    assert kept(top_p_filter(LOGITS, 0.6)) == [[1, 2], [0]]
    assert kept(top_p_filter(LOGITS, 0.75)) == [[1, 2, 3], [0]]
    assert kept(top_p_filter(LOGITS, 1e-6)) == [[1], [0]]
    assert torch.equal(top_p_filter(LOGITS, 0.0), LOGITS)
    assert torch.equal(top_p_filter(LOGITS, 1.0), LOGITS)


def test_a_batch_filters_each_row_as_if_alone():
    logits = torch.randn(7, 50)
    for function, value in ((top_k_filter, 5), (top_p_filter, 0.5)):
        alone = torch.cat([function(row[None], value) for row in logits])
        assert torch.equal(function(logits, value), alone)


def test_temperature_comes_before_top_p():
    # At temperature 0.5 the likeliest token of the first row has probability 0.53, above 0.5.
    probabilities = token_probabilities(LOGITS, SamplingConfig(temperature=0.5, top_k=0, top_p=0.5))
    assert kept(probabilities.log()) == [[1], [0]]
    plain = token_probabilities(LOGITS, SamplingConfig(temperature=1.0, top_k=0))
    torch.testing.assert_close(plain, LOGITS.exp())


def test_draw_inverts_the_cumulative_distribution():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(6, 5)
    uniform = torch.tensor([0.0, 0.1, 0.2499, 0.2501, 0.9, 1 - 2**-24])
    assert draw(probabilities, uniform).tolist() == [1, 1, 1, 3, 3, 3]


def test_draw_follows_the_probabilities():
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(40_000, 4)
    counts = draw(probabilities, torch.rand(40_000)).bincount(minlength=4) / 40_000
    torch.testing.assert_close(counts, probabilities[0], atol=0.01, rtol=0)


def test_uniforms_of_a_row_depend_on_its_seed_alone():
    many = row_uniforms([5, 6, 7], 10)
    assert torch.equal(row_uniforms([6], 10)[0], many[1])
    assert not torch.equal(many[0], many[1])
    assert many.shape == (3, 10)
    assert many.min() >= 0 and many.max() < 1


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_uniforms_do_not_depend_on_the_default_dtype(default_dtype, default):
    expected = row_uniforms([5, 6], 1000)
    default_dtype(default)
    uniforms = row_uniforms([5, 6], 1000)
    assert uniforms.dtype == row_uniforms([], 3).dtype == torch.float32
    assert torch.equal(uniforms, expected)
    assert len(uniforms[0].unique()) > 990


def test_seeds_do_not_coincide():
    seeds = {
        derive_seed(seed, use, step) for seed in range(3) for use in ("rows", "layouts") for step in range(50)
    }
    assert len(seeds) == 300
    assert derive_seed(0, "rows", 1) == derive_seed(0, "rows", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)
