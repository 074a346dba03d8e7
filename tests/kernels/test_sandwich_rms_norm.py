# SPDX-License-Identifier: Apache-2.0
"""sandwich_rms_norm: the reference by hand and by properties, then every backend against it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogview_kernels import rms_norm, sandwich_rms_norm
from cogview_kernels.sandwich_rms_norm.reference import sandwich_rms_norm_reference

MODES = [None, "row", "tensor"]


# ---- the reference


def test_equals_torch():
    branch, residual = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    post, pre = torch.randn(2, 9, dtype=torch.float64)
    residual_out, normed = sandwich_rms_norm_reference(branch, residual, post, pre)
    expected = residual + F.rms_norm(branch, (9,), post, 1e-6)
    torch.testing.assert_close(residual_out, expected)
    torch.testing.assert_close(normed, F.rms_norm(expected, (9,), pre, 1e-6))
    alone, none = sandwich_rms_norm_reference(branch, residual, post)
    assert torch.equal(alone, residual_out) and none is None


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("options", [{"weight_offset": 1.0}, {"round_before_weight": True}, {}], ids=str)
def test_reference_is_what_the_models_compute(options, dtypes):
    """The norm as test_rms_norm.py has it, rounded to the branch's dtype; the sum in the promoted one."""
    branch, residual = (torch.randn(40, 64).to(dtype) for dtype in dtypes)
    post, pre = torch.randn(2, 64).bfloat16()
    residual_out, normed = sandwich_rms_norm(branch, residual, post, pre, backend="reference", **options)
    expected = residual + rms_norm(branch, post, backend="reference", **options)
    assert residual_out.dtype == dtypes[1] and torch.equal(residual_out, expected)
    assert torch.equal(normed, rms_norm(expected, pre.to(dtypes[1]), backend="reference", **options))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_gradient(mode, dropout_p):
    inputs = [torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs += [torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    # eps is so small that the maximum's own derivative, which is left out on purpose, does not show.
    call = lambda *a: sandwich_rms_norm_reference(  # noqa: E731
        *a, eps=1e-9, weight_offset=1.0, pb_relax=mode, dropout_p=dropout_p, seed=5
    )
    assert torch.autograd.gradcheck(call, inputs)
