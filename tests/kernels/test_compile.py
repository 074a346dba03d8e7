# SPDX-License-Identifier: Apache-2.0
"""Every op under ``torch.compile(fullgraph=True)``, both directions, where lengths and numbers change."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cogview_kernels import (
    ThreeRegionLayout,
    decode_attention,
    decode_linear,
    decode_step,
    layer_norm,
    linear_cross_entropy,
    local_attention_2d,
    merge_attention,
    rms_norm,
    sandwich_layer_norm,
    sandwich_rms_norm,
    stable_softmax,
    three_region_attention,
)
from tests.helpers.stack import random_stack

LENGTHS = range(20, 50, 3)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def heads(T):
    return torch.randn(2, 2, T, 32)


def pivots(T):
    return torch.stack([torch.randperm(T)[:6] for _ in range(2)])


def drawn_layout(q, k, v, backend):
    """As CogView does at every layer: the bias of the pivots follows from the length."""
    text = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool)
    layout = ThreeRegionLayout.sample(text, 6, block_size=4, window_blocks=2)
    return three_region_attention(q, k, v, layout, scale=0.3, backend=backend)


STACK = random_stack()

# Arguments for a length, and the call.
CALLS = {
    "three_region_attention": (
        lambda T: (heads(T), heads(T), heads(T), pivots(T)),
        lambda q, k, v, p, backend: three_region_attention(
            q, k, v, ThreeRegionLayout(p, 4, 2, 0.5), return_lse=backend != "sdpa", backend=backend
        ),
    ),
    "three_region_attention, drawn": (lambda T: (heads(T), heads(T), heads(T)), drawn_layout),
    "decode_attention": (
        lambda T: (heads(1), heads(T), heads(T), torch.tensor([5, T]), pivots(T)),
        lambda q, k, v, n, p, backend: decode_attention(
            q, k, v, n, layout=ThreeRegionLayout(p, 4, 2, 0.5), backend=backend
        ),
    ),
    "local_attention_2d": (
        lambda T: (heads(3 * T), heads(3 * T), heads(3 * T)),
        lambda q, k, v, backend: local_attention_2d(q, k, v, (q.shape[2] // 3, 3), (3, 3), backend=backend),
    ),
    "merge_attention": (
        lambda T: (heads(T), heads(T), torch.randn(2, 2, T), torch.randn(2, 2, T)),
        lambda a, b, c, d, backend: merge_attention([a, b], [c, d], return_lse=True, backend=backend),
    ),
    "layer_norm": (
        lambda T: (torch.randn(T, 8), torch.randn(8), torch.randn(8)),
        lambda x, weight, bias, backend: layer_norm(x, weight, bias, backend=backend),
    ),
    "sandwich_layer_norm": (
        lambda T: (torch.randn(T, 8), torch.randn(T, 8), torch.randn(8)),
        lambda x, y, w, backend: sandwich_layer_norm(
            x, y, w, w, w, w, dropout_p=0.1, seed=3, backend=backend
        ),
    ),
    "sandwich_layer_norm, narrow": (
        lambda T: (torch.randn(T, 8).bfloat16(), torch.randn(T, 8), torch.randn(8)),
        lambda x, y, w, backend: sandwich_layer_norm(x, y, w, w, w, w, normed_dtype=x.dtype, backend=backend),
    ),
    "rms_norm": (
        lambda T: (torch.randn(T, 8), torch.randn(8)),
        lambda x, weight, backend: rms_norm(x, weight, weight_offset=1.0, backend=backend),
    ),
    "sandwich_rms_norm": (
        lambda T: (torch.randn(T, 8), torch.randn(T, 8), torch.randn(8)),
        lambda x, y, w, backend: sandwich_rms_norm(x, y, w, w, dropout_p=0.1, seed=3, backend=backend),
    ),
    "sandwich_rms_norm, narrow": (
        lambda T: (torch.randn(T, 8).bfloat16(), torch.randn(T, 8), torch.randn(8)),
        lambda x, y, w, backend: sandwich_rms_norm(x, y, w, w, normed_dtype=x.dtype, backend=backend),
    ),
    "decode_linear": (
        lambda T: (torch.randn(2, T), torch.randn(11, T), torch.randn(11)),
        lambda x, w, b, backend: decode_linear(x, w, b, activation="gelu_tanh", backend=backend),
    ),
    "decode_step": (
        lambda T: (torch.randn(2, 1, 64), torch.zeros(2, 2, 2, 2, T, 32), torch.tensor([2, 5])),
        lambda x, cache, n, backend: decode_step(x, STACK, cache, n, backend=backend),
    ),
    "stable_softmax": (
        lambda T: (torch.randn(2, T, T), torch.ones(T, dtype=torch.bool)),
        lambda x, mask, backend: stable_softmax(x, alpha=2.0, mask=mask, causal=True, backend=backend),
    ),
    "linear_cross_entropy": (
        lambda T: (torch.randn(T, 8), torch.randn(11, 8), torch.randint(0, 11, (T,))),
        lambda x, w, t, backend: linear_cross_entropy(x, w, t, backend=backend),
    ),
}
# In plain PyTorch what follows from lengths by more than shapes: the bias of the pivots, and masks of grids.
CASES = [(name, None) for name in CALLS]
CASES += [("three_region_attention, drawn", backend) for backend in ("sdpa", "reference")]
CASES += [("local_attention_2d", "sdpa")]


def results(function, arguments, backend, differentiable):
    """Outputs, and gradients if there are any."""
    inputs = [x.requires_grad_(differentiable and x.is_floating_point()) for x in arguments]
    out = function(*inputs, backend)
    outputs = out if isinstance(out, tuple) else (out,)
    if not differentiable:
        return outputs
    wanted = [x for x in inputs if x.requires_grad]
    return *outputs, *torch.autograd.grad(sum(x.pow(2).sum() for x in outputs), wanted)


@pytest.mark.parametrize(("name", "backend"), CASES, ids=str)
def test_ten_lengths_take_two_compilations(name, backend):
    make, call = CALLS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    differentiable = name not in ("decode_attention", "decode_linear", "decode_step")
    for T in LENGTHS:
        arguments, found = make(T), []
        for function in (compiled, call):
            torch.manual_seed(T)
            found.append(results(function, arguments, backend, differentiable))
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2


LAYOUT = ThreeRegionLayout(torch.tensor([[0, 2]]), 2, 1)
NUMBERS = {
    "eps": lambda x, number: layer_norm(x, eps=number),
    "eps and weight_offset": lambda x, number: rms_norm(x, x[0], eps=number, weight_offset=number),
    "dropout_p of RMSNorm": lambda x, number: sandwich_rms_norm(x, x, None, dropout_p=number, seed=3)[0],
    "dropout_p": lambda x, number: sandwich_layer_norm(
        x, x, None, None, None, None, dropout_p=number, seed=3
    )[1],
    "alpha and scale": lambda x, number: stable_softmax(x, alpha=number, scale=number),
    "scale of attention": lambda x, number: three_region_attention(
        *(x[None, None],) * 3, LAYOUT, scale=number, dropout_p=number, seed=3
    ),
    "pivot_bias": lambda x, number: three_region_attention(
        *(x[None, None],) * 3, ThreeRegionLayout(LAYOUT.pivots, 2, 1, number)
    ),
    "scale of decoding": lambda x, number: decode_attention(
        *(x[None, None],) * 3, torch.tensor([5]), scale=number
    ),
    "scale of local attention": lambda x, number: local_attention_2d(
        *(x[None, None],) * 3, (5, 1), (3, 1), scale=number
    ),
    "extra_memory": lambda x, number: linear_cross_entropy(x, x, torch.arange(5), extra_memory=number),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes_breaks_no_graph(name):
    """PyTorch traces the second value as a symbol; F.layer_norm too then costs a compilation per value."""
    compiled = torch.compile(NUMBERS[name], fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8)
    for number in (0.1, 0.2, 0.4):
        torch.testing.assert_close(compiled(x, number), NUMBERS[name](x, number))


def test_a_number_out_of_range_is_refused_while_tracing():
    compiled = torch.compile(lambda x, eps: layer_norm(x, eps=eps), backend="aot_eager")
    x = torch.randn(5, 8)
    for eps in (0.1, 0.2, float("inf"), float("nan"), -1.0):
        if 0 < eps < 1:
            compiled(x, eps)
            continue
        with pytest.raises(Exception, match="eps must be a positive finite number"):
            compiled(x, eps)
