# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.config import SamplingConfig
from cogview.generation import sampling
from cogview.generation.sampling import (
    Noise,
    choose,
    draw,
    exponentials,
    token_probabilities,
    top_k_filter,
    top_p_filter,
)
from cogview.seeding import derive_seed
from cogview_kernels import _draw, _extension

NEEDS_EXTENSION = pytest.mark.skipif(_extension.native is None, reason=_extension.missing_reason)
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


def test_draw_takes_the_first_to_arrive_and_none_of_probability_zero():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    noise = torch.tensor(
        [[1e-30, 1.0, 1e-30, 3.1, 1e-30], [1.0, 1.0, 1.0, 2.9, 1.0], [9.0, 17.0, 9.0, 17.0, 9.0]]
    )
    assert draw(probabilities, noise).tolist() == [1, 3, 3]


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    seeds, positions = torch.arange(400) + 5, torch.arange(100).expand(400, 100)
    counts = draw(probabilities, exponentials(seeds, positions, 4)).flatten().bincount(minlength=4)
    # Chi-square with three degrees of freedom: above 16.3 once in a thousand.
    expected = 40_000 * probabilities
    assert ((counts - expected) ** 2 / expected).sum() < 16.3


def test_noise_is_exponential_and_a_function_of_seed_position_and_index():
    seeds, positions = torch.tensor([5, -(2**62)]), torch.tensor([[0, 1, 2], [7, 0, 1]])
    noise = exponentials(seeds, positions, 50_000)
    assert torch.equal(exponentials(seeds[1:], positions[1:, 1:2], 100)[0, 0], noise[1, 1, :100])
    assert len(noise.flatten().unique()) > 0.99 * noise.numel()
    assert noise.min() > 0 and noise.max() < 17
    uniform = (-noise).exp().double().flatten()
    deviation = (uniform.sort().values - (torch.arange(300_000) + 0.5) / 300_000).abs().max()
    assert deviation < 1.95 / 300_000**0.5  # Kolmogorov and Smirnov: more once in a thousand
    rows = uniform.view(6, -1) - 0.5
    correlation = rows @ rows.T / (50_000 / 12)
    torch.testing.assert_close(correlation, torch.eye(6, dtype=torch.float64), atol=0.025, rtol=0)


def test_noise_that_is_made_at_once_is_the_same(monkeypatch):
    seeds, positions = torch.tensor([5, 6, 7]), torch.tensor([[0, 9], [3, 4], [8, 8]])
    at_once, each_time = Noise(seeds, 10, 40), Noise(seeds, 10, 40)
    assert at_once.made is not None
    monkeypatch.setattr(sampling, "MADE_AT_ONCE", 3 * 10 * 40 - 1)
    assert each_time.made is None
    assert torch.equal(at_once.at(positions), each_time.at(positions))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_noise_does_not_depend_on_the_default_dtype(default_dtype, default):
    arguments = torch.tensor([5, 6]), torch.tensor([[0], [1]]), 1000
    expected = exponentials(*arguments)
    default_dtype(default)
    noise = exponentials(*arguments)
    assert noise.dtype == torch.float32 and torch.equal(noise, expected)


def _drawn_by_pytorch(logits, config, noise, positions):
    """What :func:`choose` draws elsewhere than on the CPU, and how much later any index arrives than it."""
    rates = token_probabilities(logits, config)
    at_rate = noise.at(positions) / rates
    return draw(rates, noise.at(positions)), at_rate / at_rate.amin(-1, keepdim=True)


@NEEDS_EXTENSION
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("top_k", [0, 1, 3, 64, 200])
@pytest.mark.parametrize("V", [1, 15, 48, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_draws_what_pytorch_draws(dtype, V, top_k, isa, instruction_set):
    instruction_set(isa)
    config = SamplingConfig(temperature=0.7, top_k=top_k)
    # Of rounded logits some are equal, also at the border of top-k.
    logits = (3 * torch.randn(20, 3, V)).round(decimals=1).to(dtype)
    positions, total = torch.randint(50, (20, 3)), torch.tensor(2.0)
    noise = Noise(torch.randint(-(2**62), 2**62, (20,)), 60, V, first=7)
    expected, later = _drawn_by_pytorch(logits, config, noise, positions)
    found = choose(logits, config, noise, positions, total)
    # Of two that arrive together but for roundings of rates and noise either may be taken.
    assert later.gather(-1, found[..., None]).max() <= 1 + 1e-5
    assert (found == expected).float().mean() > 0.9
    torch.testing.assert_close(total, 2 + logits.float().sum(), rtol=1e-4, atol=1e-3)
    assert torch.equal(found, choose(logits, config, noise, positions))
    alone = [
        choose(logits[b : b + 1], config, Noise(noise.seeds[b : b + 1], 60, V, 7), positions[b : b + 1])
        for b in range(20)
    ]
    assert torch.equal(found, torch.cat(alone))


@NEEDS_EXTENSION
def test_the_kernel_follows_the_probabilities():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(400, 100, 4).contiguous()
    noise, positions = Noise(torch.arange(400) + 5, 100, 4), torch.arange(100).expand(400, 100)
    counts = choose(logits, SamplingConfig(top_k=0), noise, positions).flatten().bincount(minlength=4)
    expected = 40_000 * torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # as above


@NEEDS_EXTENSION
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_kernel_tells_of_logits_that_are_not_finite(temperature, bad):
    logits, total = torch.randn(3, 2, 70), torch.zeros(())
    logits[1, 1] = bad
    config, noise = SamplingConfig(temperature=temperature, top_k=9), Noise(torch.arange(3), 2, 70)
    found = choose(logits, config, noise, torch.arange(2).expand(3, 2), total)
    assert not total.isfinite() and ((found >= 0) & (found < 70)).all()


@NEEDS_EXTENSION
def test_what_the_kernel_does_not_take_goes_to_pytorch(monkeypatch):
    monkeypatch.setattr(_draw, "draw_tokens", pytest.fail)
    noise, positions = Noise(torch.arange(2), 5, 40), torch.zeros(2, 1, dtype=torch.int64)
    logits, config = torch.randn(2, 1, 40), SamplingConfig(top_k=0)
    for given, of in (
        (logits.double(), config),
        (logits.requires_grad_(), config),
        (logits.detach().mT.contiguous().mT.expand(2, 3, 40), config),
        (logits.detach(), SamplingConfig(top_p=0.9)),
    ):
        assert choose(given, of, noise, positions.expand(2, given.shape[1])).shape == given.shape[:2]
    with torch.profiler.profile():  # which is to see the ops
        assert choose(logits.detach(), config, noise, positions).shape == (2, 1)


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-39, 1e-5])
def test_cold_means_the_likeliest(temperature):
    config = SamplingConfig(temperature=temperature, top_k=0)
    logits = 1e4 * torch.randn(3, 5, 40)
    chosen = choose(logits, config, Noise(torch.arange(3), 5, 40), torch.arange(5).expand(3, 5))
    assert torch.equal(chosen, logits.argmax(-1))


def test_seeds_do_not_coincide():
    seeds = {
        derive_seed(seed, use, step) for seed in range(3) for use in ("rows", "layouts") for step in range(50)
    }
    assert len(seeds) == 300
    assert derive_seed(0, "rows", 1) == derive_seed(0, "rows", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)
