# SPDX-License-Identifier: Apache-2.0
"""sandwich_layer_norm: the reference by hand and by properties, then every backend against it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogview_kernels import _random, sandwich_layer_norm
from cogview_kernels.sandwich_layer_norm.reference import sandwich_layer_norm_reference

MODES = ["row", "tensor", None]


def keep_mask(rows: int, columns: int, p: float, seed: int, first_row: int = 0) -> torch.Tensor:
    """The common generator's mask, straight from its two functions."""
    row = torch.arange(first_row, first_row + rows)
    words = _random.philox(seed, row & 0xFFFFFFFF, row >> 32, torch.zeros_like(row))
    return _random.keep_mask(p, (words[0][:, None], words[1][:, None]), torch.arange(columns))


# ---- the reference


def test_equals_torch():
    branch, residual = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    w1, b1, w2, b2 = torch.randn(4, 9, dtype=torch.float64)
    residual_out, normed = sandwich_layer_norm_reference(branch, residual, w1, b1, w2, b2, pb_relax=None)
    expected = residual + F.layer_norm(branch, (9,), w1, b1)
    torch.testing.assert_close(residual_out, expected)
    torch.testing.assert_close(normed, F.layer_norm(expected, (9,), w2, b2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_gradient(mode, dropout_p):
    inputs = [torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs += [torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    # eps is so small that the peak's own derivative, which is left out on purpose, does not show.
    call = lambda *a: sandwich_layer_norm_reference(  # noqa: E731
        *a, eps=1e-9, pb_relax=mode, dropout_p=dropout_p, seed=5
    )
    assert torch.autograd.gradcheck(call, inputs)


def test_tensor_mode_takes_each_norms_own_maximum():
    branch, residual = torch.randn(2, 4, 16, dtype=torch.float64)
    branch[0] *= 1e-3
    residual[1] *= 1e-3
    residual_out, normed = sandwich_layer_norm_reference(
        branch, residual, None, None, None, None, pb_relax="tensor"
    )

    def by_hand(x):
        return F.layer_norm(x / (x.abs().max() / 8), (16,))

    torch.testing.assert_close(residual_out, residual + by_hand(branch))
    torch.testing.assert_close(normed, by_hand(residual_out))


# ---- dropout


@pytest.mark.parametrize("seed", [0, 7, 2**62 + 12345])
def test_dropout_mask_is_the_generators(seed):
    # A variance near eps without PB-Relax: otherwise LayerNorm hides the factor 1 / (1 - p).
    branch = (torch.rand(6, 50, dtype=torch.float64) + 1) * 1e-3
    residual_out, _ = sandwich_layer_norm_reference(
        branch, torch.zeros_like(branch), None, None, None, None, pb_relax=None, dropout_p=0.4, seed=seed
    )
    dropped = torch.where(keep_mask(6, 50, 0.4, seed), branch / 0.6, 0)
    torch.testing.assert_close(residual_out, F.layer_norm(dropped, (50,)))


def test_dropout_is_keyed_by_row_and_column():
    masks = keep_mask(64, 512, 0.5, seed=3)
    assert not any(torch.equal(masks[0], row) for row in masks[1:])
    assert not torch.equal(masks, keep_mask(64, 512, 0.5, seed=4))
    assert torch.equal(masks[10:20], keep_mask(10, 512, 0.5, seed=3, first_row=10))
    assert torch.equal(masks[:, :100], keep_mask(64, 100, 0.5, seed=3))
    far = keep_mask(4, 512, 0.5, seed=3, first_row=2**32)  # the high half of the row is in the counter
    assert not torch.equal(far, masks[:4])


def test_dropout_keeps_the_expectation():
    p, rows, columns = 0.1, 400, 500
    kept = keep_mask(rows, columns, p, seed=11).double()
    # Five standard deviations of the mean of that many draws.
    assert kept.mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / kept.numel()) ** 0.5)
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / rows) ** 0.5
    assert (kept.mean(1) - (1 - p)).abs().max() < 5 * (p * (1 - p) / columns) ** 0.5


def test_a_seed_repeats_and_none_draws_from_the_default_generator():
    x = torch.randn(3, 40)
    call = lambda seed: sandwich_layer_norm(x, x, None, None, None, None, dropout_p=0.5, seed=seed)[0]  # noqa: E731
    assert torch.equal(call(9), call(torch.tensor(9)))
    torch.manual_seed(1)
    first, second = call(None), call(None)
    torch.manual_seed(1)
    assert torch.equal(call(None), first) and not torch.equal(first, second)


# ---- dtypes and errors


def test_mixed_dtypes_are_promoted():
    branch, residual = torch.randn(3, 8).bfloat16(), torch.randn(3, 8)
    weight = torch.randn(8)
    outputs = sandwich_layer_norm(branch, residual, weight, None, None, weight)
    expected = sandwich_layer_norm(branch.float(), residual, weight, None, None, weight)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"branch": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "branch must be float32"),
        ({"residual": torch.ones(2, 3, dtype=torch.float64)}, TypeError, "residual must be float32"),
        ({"residual": torch.ones(3, 3)}, ValueError, r"shape of branch, \(2, 3\), got \(3, 3\)"),
        ({"branch": torch.ones(2, 0), "residual": torch.ones(2, 0)}, ValueError, "C of at least 1"),
        ({"post_weight": torch.ones(4)}, ValueError, r"post_weight must have shape \(3,\)"),
        ({"pre_bias": torch.ones(3).half()}, TypeError, "pre_bias must be torch.float32, as branch is"),
        ({"eps": -1.0}, ValueError, "eps must be a positive finite number"),
        ({"pb_relax": True}, ValueError, "pb_relax must be one of"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": None}, TypeError, "dropout_p must be a number"),
        ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an integer or a 0-d int64 tensor"),
        ({"dropout_p": 0.1, "seed": torch.ones(2).long()}, TypeError, r"got torch.int64 \(2,\)"),
        ({"backend": "sdpa"}, NotImplementedError, "no sdpa backend; this op has"),
    ],
    ids=lambda value: None,
)
def test_errors(arguments, error, message):
    defaults = {"branch": torch.ones(2, 3), "residual": torch.ones(2, 3)}
    defaults |= dict.fromkeys(("post_weight", "post_bias", "pre_weight", "pre_bias"))
    with pytest.raises(error, match=message):
        sandwich_layer_norm(**{**defaults, **arguments})
