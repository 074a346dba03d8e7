# SPDX-License-Identifier: Apache-2.0
"""The error budget itself: what is right passes with room to spare, what is a little wrong does not."""

from __future__ import annotations

import pytest
import torch

from cogview_kernels import ThreeRegionLayout
from cogview_kernels.layer_norm.reference import layer_norm_reference
from cogview_kernels.stable_softmax.reference import stable_softmax_reference
from cogview_kernels.three_region_attention.reference import three_region_attention_reference
from tests.helpers.rounding import RoundedIntermediates, SumsInAnotherOrder, in_one_chain
from tests.helpers.tolerance import OUTPUT, assert_within_budget, judge

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_layout(device) -> tuple[ThreeRegionLayout, int]:
    """Of one of the common block sizes, or of an odd one; with few pivots or many; and a length."""
    draw = lambda low, high: int(torch.randint(low, high + 1, ()))  # noqa: E731
    T = draw(17, 300)
    pivots = torch.randperm(T)[: draw(0, T)]
    pivots[torch.rand(len(pivots)) < 0.2] = -1
    layout = ThreeRegionLayout(pivots[None].to(device), draw(1, 64), draw(1, 4), float(torch.rand(())))
    return layout, T


@pytest.mark.budget
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(5))
def test_flex_attention_takes_six_tenths_of_the_budget(number, dtype, device):
    """Another implementation that is right, over random layouts (fifty of them: ``make seeds SEEDS=10``)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.manual_seed(torch.initial_seed() + 1000 * number)
    layout, T = random_layout(device)
    q, k, v = torch.randn(3, 1, 2, T, 32).to(dtype).to(device)
    reference = lambda q, k, v: [three_region_attention_reference(q, k, v, layout, 0.25)[0]]  # noqa: E731
    (truth,), (eager,) = judge(reference, [q, k, v])
    seen, w, W = layout.dense_mask(T), layout.block_size, layout.window_blocks

    def add_bias(score, b, h, query, key):
        return torch.where(key // w <= query // w - W, score + layout.pivot_bias, score)

    block_mask = create_block_mask(lambda b, h, query, key: seen[b, query, key], 1, None, T, T, device)
    out = flex_attention(q, k, v, score_mod=add_bias, block_mask=block_mask, scale=0.25)
    assert_within_budget(out, eager, truth, dtype=dtype, factor=0.6 * OUTPUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_exact_by_luck_has_a_budget(dtype):
    """A softmax over one key; eager arithmetic makes no error, a kernel may."""
    reference = lambda x: [stable_softmax_reference(x) * 0.7]  # noqa: E731
    x = torch.zeros(1, 1).to(dtype)
    (truth,), (eager,) = judge(reference, [x])
    eps = torch.finfo(dtype).eps
    assert_within_budget(truth.to(dtype) * (1 + eps / 2), eager, truth, dtype=dtype)
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_budget(truth.to(dtype) * (1 + 6 * eps), eager, truth, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_bits_fewer_do_not_pass(dtype):
    x = torch.randn(60, 300).to(dtype)
    (truth,), (eager,) = judge(lambda x: [layer_norm_reference(x)], [x], compute=torch.float32)
    assert_within_budget(truth.to(dtype), eager, truth, dtype=dtype)
    computed = layer_norm_reference(x.float()).double()
    coarse = computed * (1 + 4 * torch.finfo(dtype).eps * (torch.rand_like(truth) - 0.5))
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_budget(coarse.to(dtype), eager, truth, dtype=dtype)


def test_one_chain_errs_more_than_a_split_sum():
    a, b = torch.randn(2, 40, 256), torch.randn(2, 256, 30)
    truth = a.double() @ b.double()
    halves = a[..., :128] @ b[:, :128] + a[..., 128:] @ b[:, 128:]
    error = lambda x: float((x - truth).norm() / truth.norm())  # noqa: E731
    assert error(halves) < error(in_one_chain(a, b)) < 1e-6


def test_sums_are_taken_in_another_order():
    """Results and gradients are what they were but for rounding, and not to the bit."""
    x, weight, bias = torch.randn(40, 700), torch.randn(700), torch.randn(700)

    def call(x, weight, bias):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = layer_norm_reference(*leaves) @ x[:5].T
        p = stable_softmax_reference(y).log_softmax(-1).logsumexp(0)
        return [y.detach(), *torch.autograd.grad(p.sum() + y.sum(), leaves)]

    plain = call(x, weight, bias)
    with SumsInAnotherOrder(1):
        other = call(x, weight, bias)
    torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-3)
    assert not any(torch.equal(a, b) for a, b in zip(other, plain, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_intermediate_results_are_rounded(dtype):
    eps = torch.finfo(dtype).eps
    x = torch.randn(1000, dtype=torch.float64)
    mode = RoundedIntermediates(0, dtype)
    errors = torch.stack([mode.round(x, dtype) / x - 1 for _ in range(20)])
    assert eps / 4 < float(errors.abs().max()) <= eps / 2
    assert float(errors.mean().abs()) < 0.02 * eps
    special = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(mode.round(special, dtype), special, equal_nan=True)
    constant = torch.full((100,), 0.1, dtype=torch.float64)
    assert len(mode.round(constant, dtype).unique()) == 1
    with mode:
        moved, doubled = x.view(10, 100).T.flatten().clone(), x + x
    assert torch.equal(moved.sort().values, x.sort().values) and not torch.equal(doubled, 2 * x)
