# SPDX-License-Identifier: Apache-2.0
"""layer_norm: the reference by hand and by properties, then every backend against it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cogview_kernels import layer_norm
from cogview_kernels.layer_norm.reference import layer_norm_reference

MODES = ["row", "tensor", None]


# ---- the reference


def test_reference_by_hand():
    # Peak 8 leaves rows as they are; mean 4, variance 16.
    x = torch.tensor([[8.0, 0.0], [0.0, 8.0]], dtype=torch.float64)
    weight, bias = torch.tensor([2.0, 3.0]).double(), torch.tensor([1.0, -1.0]).double()
    y = layer_norm_reference(x, weight, bias, eps=9.0)
    expected = torch.tensor([[2 * 0.8 + 1, -3 * 0.8 - 1], [-2 * 0.8 + 1, 3 * 0.8 - 1]], dtype=torch.float64)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "none"])
def test_none_equals_torch(parameters):
    x = torch.randn(3, 4, 9, dtype=torch.float64)
    weight = torch.randn(9, dtype=torch.float64) if parameters in ("both", "weight") else None
    bias = torch.randn(9, dtype=torch.float64) if parameters in ("both", "bias") else None
    expected = F.layer_norm(x, (9,)) * (1 if weight is None else weight) + (0 if bias is None else bias)
    torch.testing.assert_close(layer_norm_reference(x, weight, bias, pb_relax=None), expected)


@pytest.mark.parametrize("mode", MODES)
def test_peak_only_changes_eps(mode):
    x = torch.randn(6, 11, dtype=torch.float64) * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    peak = {"row": x.abs().amax(-1, keepdim=True), "tensor": x.abs().amax(), None: torch.tensor(8.0)}[mode]
    d = x - x.mean(-1, keepdim=True)
    expected = d / (d.square().mean(-1, keepdim=True) + 1e-5 * (peak / 8) ** 2).sqrt()
    torch.testing.assert_close(layer_norm_reference(x, pb_relax=mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_reference_gradient(mode):
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    # eps is so small that the peak's own derivative, which is left out on purpose, does not show.
    call = lambda *a: layer_norm_reference(*a, eps=1e-9, pb_relax=mode)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight, bias))


@pytest.mark.parametrize("mode", ["row", "tensor"])
def test_the_peak_is_a_constant_to_the_gradient(mode):
    x = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(1, 7, dtype=torch.float64)
    ours = torch.autograd.grad(layer_norm_reference(x, eps=5.0, pb_relax=mode), x, dy)[0]
    effective = 5.0 * float(x.detach().abs().max() / 8) ** 2
    plain = torch.autograd.grad(F.layer_norm(x, (7,), eps=effective), x, dy)[0]
    torch.testing.assert_close(ours, plain)


def test_where_the_modes_agree_and_differ():
    """A row is damped by sqrt(var / (var + eps (peak / 8)^2)): by nothing if its variance is large."""
    torch.manual_seed(1)
    unit = torch.randn(4, 256, dtype=torch.float64)
    unit = (unit - unit.mean(-1, keepdim=True)) / unit.std(-1, keepdim=True, unbiased=False)
    damping = {}
    for case, x in {
        "alike": unit,
        "small row of a large tensor": torch.cat([unit[:1] * 1e-3, unit[1:]]),
        "small tensor": unit * 1e-3,
        "almost constant": 100 + unit * 1e-2,
    }.items():
        for mode in MODES:
            damping[case, mode] = layer_norm_reference(x, pb_relax=mode)[0].std(unbiased=False).item()
    peak = unit.abs().max().item()
    damped = lambda variance, peak: math.sqrt(variance / (variance + 1e-5 * (peak / 8) ** 2))  # noqa: E731
    for mode in MODES:
        assert damping["alike", mode] == pytest.approx(1, abs=1e-5)
    row_peak = 1e-3 * unit[0].abs().max().item()
    assert damping["small row of a large tensor", "row"] == pytest.approx(damped(1e-6, row_peak), rel=1e-9)
    assert damping["small row of a large tensor", "row"] > 0.99999
    peak = unit[1:].abs().max().item()
    assert damping["small row of a large tensor", "tensor"] == pytest.approx(damped(1e-6, peak), rel=1e-9)
    assert damping["small row of a large tensor", "tensor"] < 0.7
    assert damping["small row of a large tensor", None] == pytest.approx(damped(1e-6, 8), rel=1e-9)
    assert damping["small tensor", "tensor"] > 0.99999 and damping["small tensor", None] < 0.4
    assert damping["almost constant", "row"] < 0.3 and damping["almost constant", None] > 0.9


def extreme_rows(dtype: torch.dtype) -> torch.Tensor:
    """The largest values with and without sign changes, constants, one outlier, subnormals, zeros."""
    limit, tiny = torch.finfo(torch.float16).max, torch.finfo(dtype).smallest_normal
    noise = torch.randn(40, dtype=torch.float64)
    rows = torch.zeros(9, 40, dtype=torch.float64)
    rows[0, ::2], rows[0, 1::2] = limit, -limit
    rows[1] = limit
    rows[2], rows[2, 11] = noise, limit
    rows[3] = noise * limit / 16
    rows[4] = noise * limit * 1e-4
    rows[5] = -0.1
    rows[6] = noise * tiny / 8
    rows[7], rows[7, :20] = limit, -limit
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_reference_of_extreme_rows_is_finite(mode, dtype):
    x = extreme_rows(dtype)
    truth = layer_norm_reference(x.double(), pb_relax=mode)
    y = layer_norm(x, pb_relax=mode, backend="reference")
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), truth, atol=2e-3, rtol=8e-3)


def test_half_types_are_widened():
    x, weight = torch.randn(5, 33).bfloat16(), torch.randn(33)
    y = layer_norm(x, weight, backend="reference")
    assert torch.equal(y, layer_norm_reference(x.float(), weight).bfloat16())


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"x": torch.ones(2, 3, dtype=torch.float64)}, TypeError, "backend='reference' takes float64"),
        ({"x": torch.ones(())}, ValueError, r"x must be \[..., C\] with C of at least 1"),
        ({"x": torch.ones(3, 0)}, ValueError, r"got shape \(3, 0\)"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(3,\)"),
        ({"bias": torch.ones(1, 3)}, ValueError, r"bias must have shape \(3,\)"),
        ({"weight": torch.ones(3).half()}, TypeError, "weight must be torch.float32, as x is"),
        ({"eps": 0.0}, ValueError, "eps must be a positive finite number, got 0.0"),
        ({"pb_relax": "batch"}, ValueError, "pb_relax must be one of 'row', 'tensor', None, got 'batch'"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
        ({"backend": "sdpa"}, NotImplementedError, "no sdpa backend; this op has"),
    ],
    ids=lambda value: None,
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        layer_norm(**{"x": torch.ones(2, 3), **arguments})
