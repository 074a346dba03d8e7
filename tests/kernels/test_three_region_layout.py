# SPDX-License-Identifier: Apache-2.0
"""ThreeRegionLayout: masks against plain loops, sampling, and the plan."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cogview_kernels import ThreeRegionLayout
from tests.helpers.attention import brute_force_mask, regions

# T, block_size, window_blocks, pivots
MASKS = {
    "remainder": (23, 4, 2, [[0, 1, 9, 14], [22, 3, 7, 11]]),
    "any_order_and_pads": (23, 4, 2, [[-1, 17, 0, 5], [8, -1, -1, 2]]),
    "different_counts": (19, 3, 1, [[0, 1, 2, 3, 4], [11, -1, -1, -1, -1]]),
    "all_pads": (9, 2, 1, [[-1, -1]]),
    "no_pivots": (17, 4, 2, [[], []]),
    "one_position": (1, 4, 2, [[0]]),
    "window_past_the_start": (12, 8, 6, [[3, 5]]),
    "blocks_of_one": (11, 1, 3, [[0, 4, 9]]),
    "block_past_the_end": (7, 100, 1, [[1]]),
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
def test_dense_mask(case, dtype, causal):
    T, w, W, pivots = MASKS[case]
    layout = ThreeRegionLayout(torch.tensor(pivots, dtype=dtype), w, W, 0.5, causal=causal)
    expected = brute_force_mask(layout.pivots, w, W, T, causal)
    assert torch.equal(layout.dense_mask(T), expected)
    assert bool(expected.diagonal(dim1=1, dim2=2).all()), "every query sees itself"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", [c for c in MASKS if c != "one_position"])
def test_plan_counts_keys_and_tiles(case, causal):
    T, w, W, pivots = MASKS[case]
    plan = ThreeRegionLayout(torch.tensor(pivots, dtype=torch.int64), w, W, causal=causal).plan(T)
    ahead = None if causal else T
    keys = tiles = 0
    for sample in pivots:
        keys += sum(len(part) for i in range(T) for part in regions(sample, w, W, i, ahead))
        for start in range(0, T, w):
            window, far = regions(sample, w, W, min(T, start + w) - 1, ahead)
            tiles += len({j // w for j in window}) + -(-len(far) // w)
    assert plan.keys_per_query == pytest.approx(keys / len(pivots) / T)
    assert plan.gathered_tiles == pytest.approx(tiles / len(pivots))
    blocks = -(-T // w)
    assert plan.dense_tiles == (blocks * (blocks + 1) // 2 if causal else blocks**2)
    assert plan.dense_keys_per_query == ((T + 1) / 2 if causal else T)


@pytest.mark.parametrize(
    ("T", "w", "W", "P", "low", "high"),
    [(4224, 128, 6, 768, 1.8, 2.1), (4224, 64, 4, 256, 4.0, 5.5), (1088, 64, 4, 256, 1.4, 1.75)],
)
def test_plan_predicts_the_gain(T, w, W, P, low, high):
    layout = ThreeRegionLayout.sample(torch.zeros(1, T, dtype=torch.bool), P, block_size=w, window_blocks=W)
    plan = layout.plan(T)
    assert low < plan.predicted_gain < high
    assert "faster than dense" in str(plan)


def test_plan_says_where_dense_wins():
    layout = ThreeRegionLayout.sample(torch.zeros(1, 700, dtype=torch.bool), 64)
    assert layout.plan(700).predicted_gain < 1
    assert "dense causal attention wins" in str(layout.plan(700))
    assert "dense attention wins" in str(replace(layout, causal=False).plan(700))


# ---- sample


def masks():
    text = torch.zeros(3, 50, dtype=torch.bool)
    text[0, :5], text[1, 20:23] = True, True
    valid = torch.ones(3, 50, dtype=torch.bool)
    valid[0, 40:], valid[1, :20], valid[2, 7:] = False, False, False
    return text, valid


def test_sample_takes_all_text_and_unique_valid_positions():
    text, valid = masks()
    for _ in range(20):
        layout = ThreeRegionLayout.sample(text, 12, block_size=4, window_blocks=2, valid_mask=valid)
        assert layout.pivots.shape == (3, 12) and (layout.block_size, layout.window_blocks) == (4, 2)
        for b in range(3):
            drawn = [p for p in layout.pivots[b].tolist() if p != -1]
            assert len(set(drawn)) == len(drawn) == min(12, int((text[b] | valid[b]).sum()))
            assert set(text[b].nonzero()[:, 0].tolist()) <= set(drawn)
            assert all(bool(text[b, p] | valid[b, p]) for p in drawn)


def test_sample_of_both_sides():
    layout = ThreeRegionLayout.sample(masks()[0], 12, block_size=4, causal=False)
    assert not layout.causal and layout.pivot_bias == math.log(50 // 12)


def test_sample_is_uniform():
    """Chi-square over 20,000 draws of 5 among 30: mean below 29, deviation below 7.6."""
    text = torch.zeros(20000, 34, dtype=torch.bool)
    text[:, :4] = True
    generator = torch.Generator().manual_seed(5)
    pivots = ThreeRegionLayout.sample(text, 9, generator=generator).pivots
    counts = torch.bincount(pivots.flatten(), minlength=34).double()
    assert bool((counts[:4] == 20000).all())
    expected = 20000 * 5 / 30
    chi_square = float(((counts[4:] - expected) ** 2 / expected).sum())
    assert 5 < chi_square < 60
    pairs = torch.zeros(34, 34)
    hits = torch.zeros(20000, 34).scatter_(1, pivots, 1.0)
    pairs = (hits.T @ hits)[4:, 4:]
    expected_pair = 20000 * 5 * 4 / 30 / 29
    off_diagonal = pairs[~torch.eye(30, dtype=torch.bool)]
    assert float((off_diagonal / expected_pair - 1).abs().max()) < 0.3, "draws of one sample are independent"


def test_sample_is_determined_by_its_generator():
    text, valid = masks()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return ThreeRegionLayout.sample(text, 12, valid_mask=valid, generator=generator).pivots

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    torch.manual_seed(3)
    first, second = (ThreeRegionLayout.sample(text, 12).pivots for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, ThreeRegionLayout.sample(text, 12).pivots) and not torch.equal(first, second)
    assert not torch.equal(first[0], first[2]), "each sample draws its own"


@pytest.mark.parametrize(
    ("T", "P", "bias"), [(4224, 768, math.log(5)), (1088, 256, math.log(4)), (1088, 768, 0.0), (50, 60, 0.0)]
)
def test_sample_corrects_the_density(T, P, bias):
    text = torch.zeros(1, T, dtype=torch.bool)
    assert ThreeRegionLayout.sample(text, P).pivot_bias == pytest.approx(bias)
    assert ThreeRegionLayout.sample(text, P, density_correction=False).pivot_bias == 0


def test_sample_pads_past_the_sequence():
    pivots = ThreeRegionLayout.sample(torch.zeros(2, 5, dtype=torch.bool), 8).pivots
    assert pivots.shape == (2, 8)
    assert sorted(pivots[0].tolist()) == [-1, -1, -1, 0, 1, 2, 3, 4]


def test_sample_without_pivots():
    layout = ThreeRegionLayout.sample(torch.zeros(2, 5, dtype=torch.bool), 0)
    assert layout.pivots.shape == (2, 0) and layout.pivot_bias == 0


def test_sample_compiles_without_graph_break():
    draw = lambda text: ThreeRegionLayout.sample(text, 12, block_size=4).pivots  # noqa: E731
    pivots = torch.compile(draw, fullgraph=True, backend="aot_eager")(masks()[0])
    assert pivots.shape == (3, 12) and set(range(5)) <= set(pivots[0].tolist())


# ---- errors


def test_text_is_never_lost():
    text = torch.zeros(2, 20, dtype=torch.bool)
    text[1, :6] = True
    with pytest.raises(ValueError, match=r"more text positions than num_pivots \(5\); raise num_pivots to 6"):
        ThreeRegionLayout.sample(text, 5)
    assert ThreeRegionLayout.sample(text, 6).pivots.shape == (2, 6)
    compiled = torch.compile(lambda t: ThreeRegionLayout.sample(t, 5).pivots, backend="aot_eager")
    with pytest.raises(RuntimeError, match="more text positions than num_pivots"):
        compiled(text)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pivots": [[1]]}, TypeError, "pivots must be a tensor, got list"),
        ({"pivots": torch.ones(1, 2)}, TypeError, "pivots must be int64, int32 or int16, got torch.float32"),
        ({"pivots": torch.ones(2, dtype=torch.int64)}, ValueError, r"shape \[B, P\], got \(2,\)"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"block_size": 2.0}, TypeError, "block_size must be an int, got float"),
        ({"window_blocks": -1}, ValueError, "window_blocks must be at least 1, got -1"),
        ({"pivot_bias": float("nan")}, ValueError, "pivot_bias must be a finite number, got nan"),
        ({"causal": 0}, TypeError, "causal must be a bool, True or False, got int"),
    ],
    ids=lambda value: None,
)
def test_layout_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ThreeRegionLayout(**{"pivots": torch.ones(1, 1, dtype=torch.int64), **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text_mask": torch.ones(1, 4)}, TypeError, "text_mask must be a boolean tensor, got torch.float32"),
        ({"text_mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"shape \[B, T\], got \(4,\)"),
        (
            {"valid_mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"text_mask, \(1, 4\), got \(2, 4\)",
        ),
        ({"valid_mask": torch.ones(1, 4)}, TypeError, "valid_mask must be a boolean tensor"),
        ({"text_mask": None}, TypeError, "text_mask must be a boolean tensor, got NoneType"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"num_pivots": -1}, ValueError, "num_pivots must be at least 0, got -1"),
        ({"num_pivots": True}, TypeError, "num_pivots must be an int, got bool"),
    ],
    ids=lambda value: None,
)
def test_sample_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ThreeRegionLayout.sample(
            **{"text_mask": torch.zeros(1, 4, dtype=torch.bool), "num_pivots": 2, **arguments}
        )


def test_a_mask_of_a_length_that_pivots_lie_past_is_an_error():
    with pytest.raises(ValueError, match=r"layout.pivots must lie in \[0, 10\) \(-1 pads\), got 30"):
        ThreeRegionLayout(torch.tensor([[30]])).dense_mask(10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_draw_does_not_depend_on_the_default_dtype(dtype):
    text = torch.zeros(2, 1000, dtype=torch.bool)

    def draw():
        return ThreeRegionLayout.sample(text, 400, generator=torch.Generator().manual_seed(3)).pivots

    expected = draw()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(draw(), expected)
    finally:
        torch.set_default_dtype(torch.float32)
