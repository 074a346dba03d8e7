# SPDX-License-Identifier: Apache-2.0
"""rms_norm: the reference by hand and by properties, then every backend against it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogview_kernels import rms_norm
from cogview_kernels.rms_norm.reference import rms_norm_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MODES = [None, "row", "tensor"]


# ---- the reference


def gemma(x, weight):
    """As Gemma2RMSNorm and Gemma3RMSNorm of transformers 5.24 write it, with eps 1e-6."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).type_as(x)


def glm(x, weight):
    """As Glm4RMSNorm, GlmImageRMSNorm and LlamaRMSNorm write it."""
    y = x.to(torch.float32)
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def olmo(x, weight):
    """As Olmo2RMSNorm writes it."""
    y = x.to(torch.float32)
    return (weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


# How the models call it.
MODELS = {
    gemma: {"weight_offset": 1.0},
    glm: {"round_before_weight": True},
    olmo: {},
}


def test_reference_by_hand():
    # The mean square is 25 - 9 = 16, and 16 + eps is 25.
    x = torch.tensor([[4.0, -4.0, 0.0, 32**0.5]], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    y = rms_norm_reference(x, weight, eps=9.0)
    torch.testing.assert_close(y, torch.tensor([[0.8, -1.6, 0.0, 0.0]], dtype=torch.float64))
    y = rms_norm_reference(x, weight, eps=9.0, weight_offset=1.0)
    torch.testing.assert_close(y, torch.tensor([[1.6, -2.4, 0.0, 32**0.5 / 5]], dtype=torch.float64))
    assert torch.equal(rms_norm_reference(x, weight_offset=1.0), rms_norm_reference(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_reference_is_what_the_models_compute(model, dtype):
    x, weight = (2 * torch.randn(40, 64)).to(dtype), torch.randn(64)
    for w in (weight, weight.to(dtype)):
        assert torch.equal(rms_norm(x, w, backend="reference", **MODELS[model]), model(x, w).to(dtype))


def test_equals_torch():
    x, weight = torch.randn(3, 4, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(rms_norm_reference(x, weight), F.rms_norm(x, (9,), weight, 1e-6))
    torch.testing.assert_close(rms_norm_reference(x), F.rms_norm(x, (9,), None, 1e-6))


@pytest.mark.parametrize("mode", MODES)
def test_peak_only_changes_eps(mode):
    x = torch.randn(6, 11, dtype=torch.float64) * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    peak = {"row": x.abs().amax(-1, keepdim=True), "tensor": x.abs().amax(), None: torch.tensor(8.0)}[mode]
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3 * (peak / 8) ** 2).sqrt()
    torch.testing.assert_close(rms_norm_reference(x, eps=1e-3, pb_relax=mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_reference_gradient(mode):
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    # eps is so small that the maximum's own derivative, which is left out on purpose, does not show.
    call = lambda *a: rms_norm_reference(*a, eps=1e-9, weight_offset=1.0, pb_relax=mode)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight))
