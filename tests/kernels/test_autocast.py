# SPDX-License-Identifier: Apache-2.0
"""Under autocast an op takes what its PyTorch expression takes, and casts where that casts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cogview_kernels import (
    ThreeRegionLayout,
    decode_attention,
    decode_linear,
    layer_norm,
    linear_cross_entropy,
    local_attention_2d,
    rms_norm,
    sandwich_layer_norm,
    sandwich_rms_norm,
    three_region_attention,
)

LAYOUT = ThreeRegionLayout(torch.tensor([[0, 3]]), 8, 1)
LENGTHS = torch.tensor([6])
ATTENTION = {
    "three_region_attention": lambda q, k, v, **kw: three_region_attention(q, k, v, LAYOUT, **kw),
    "decode_attention": lambda q, k, v, **kw: decode_attention(q, k, v, LENGTHS, **kw),
    "local_attention_2d": lambda q, k, v, **kw: local_attention_2d(
        q, k, v, (3, 2), (3, 3), extra_k=q, extra_v=v, **kw
    ),
}


def heads(*dtypes):
    return [torch.randn(1, 2, 6, 16).to(dtype) for dtype in dtypes]


@pytest.mark.parametrize("backend", [None, "sdpa", "reference"])
@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.bfloat16),  # rotary tables in float32, as many models have them
        (torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_attention_casts_as_sdpa_does(op, backend, dtypes):
    q, k, v = heads(*dtypes)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = ATTENTION[op](q, k, v, backend=backend)
        assert out.dtype == scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    cast = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, ATTENTION[op](*cast, backend=backend))
    with pytest.raises(TypeError, match="dtype of q") if len(set(dtypes)) > 1 else torch.no_grad():
        ATTENTION[op](q, k, v, backend=backend)


@pytest.mark.parametrize("op", ["three_region_attention", "local_attention_2d"])
def test_gradients_have_the_dtypes_of_the_inputs(op):
    inputs = [x.requires_grad_() for x in heads(torch.float32, torch.float32, torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        out = ATTENTION[op](*inputs)
    out.float().pow(2).sum().backward()
    assert [x.grad.dtype for x in inputs] == [x.dtype for x in inputs]
    assert all(bool(x.grad.any()) for x in inputs)


@pytest.mark.parametrize("op", ATTENTION)
def test_float64_is_left_alone(op):
    q, k, v = heads(*[torch.float64] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert ATTENTION[op](q, k, v).dtype == torch.float64


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("sandwich", [sandwich_layer_norm, sandwich_rms_norm])
def test_a_product_takes_a_narrow_normed_as_it_is(sandwich, backend):
    """To the same bits as where autocast casts it; so are all gradients."""
    x, first, second = torch.randn(6, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 8)
    parameters = torch.randn(4 if sandwich is sandwich_layer_norm else 2, 16).unbind()
    leaves, results, casts = [*first.parameters(), *second.parameters()], [], []
    for dtype in (None, torch.bfloat16):
        with torch.profiler.profile() as record, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            residual_out, normed = sandwich(first(x), x, *parameters, normed_dtype=dtype, backend=backend)
            y = second(normed)
            gradients = torch.autograd.grad(residual_out.sum() + y.float().pow(2).sum(), leaves)
        results.append([residual_out, y, *gradients])
        casts.append(sum(event.name == "aten::_to_copy" for event in record.events()))
    assert all(map(torch.equal, *results))
    # Forward and backward. The reference casts in its own ways.
    assert backend is not None or casts[1] == casts[0] - 2


def test_the_loss_leaves_float64_alone():
    """As F.linear does; and what is no float is an error, not cast to one."""
    hidden, weight = torch.randn(6, 32).double(), torch.randn(50, 32).double()
    target = torch.randint(0, 50, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target)
        with pytest.raises(TypeError, match=r"hidden must be float32, .* got torch.int64"):
            linear_cross_entropy(hidden.long(), weight, target)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, target))


@torch.no_grad()
def test_autocast_of_another_device_is_none():
    """A kernel may run beside it, and what was found then says nothing of the device's own autocast."""
    x, weight = torch.randn(2, 32), torch.randn(8, 32)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert decode_linear(x, weight).dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)
    with torch.autocast("cpu", torch.bfloat16):
        assert decode_linear(x, weight).dtype == torch.bfloat16


def test_autocast_under_compile():
    q, k, v = heads(torch.float32, torch.float32, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = ATTENTION["three_region_attention"](q, k, v)
        compiled = torch.compile(ATTENTION["three_region_attention"], fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v), expected)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_norms_take_parameters_of_another_dtype(backend):
    x, weight, bias = torch.randn(3, 8), torch.randn(8).bfloat16(), torch.randn(8).half()
    with torch.autocast("cpu", torch.bfloat16):
        normed = layer_norm(x, weight, bias, backend=backend)
        both = sandwich_layer_norm(x, x, weight, bias, weight, bias, backend=backend)
        rms = rms_norm(x, weight, backend=backend)
        both_rms = sandwich_rms_norm(x.bfloat16(), x, bias, weight, backend=backend)
    torch.testing.assert_close(normed, layer_norm(x, weight.float(), bias.float()))
    wide = weight.float(), bias.float()
    torch.testing.assert_close(rms, rms_norm(x, wide[0]))
    expected = sandwich_rms_norm(x.bfloat16(), x, wide[1], wide[0], backend=backend)
    torch.testing.assert_close(both_rms, expected)
    torch.testing.assert_close(both, sandwich_layer_norm(x, x, *wide, *wide))
    with pytest.raises(TypeError, match=r"weight must be torch\.float32"):
        layer_norm(x, weight, bias, backend=backend)
