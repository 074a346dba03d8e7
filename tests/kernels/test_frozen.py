# SPDX-License-Identifier: Apache-2.0
"""Gradients that nobody wants are neither made nor kept, and those that somebody wants stay what they are."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from cogview_kernels import (
    ThreeRegionLayout,
    layer_norm,
    rms_norm,
    sandwich_layer_norm,
    sandwich_rms_norm,
    three_region_attention,
)
from cogview_kernels.layer_norm.op import layer_norm_backward_op
from cogview_kernels.rms_norm.op import rms_norm_backward_op
from cogview_kernels.sandwich_layer_norm.op import sandwich_layer_norm_backward_op
from cogview_kernels.sandwich_rms_norm.op import sandwich_rms_norm_backward_op
from cogview_kernels.three_region_attention.op import three_region_attention_backward_op


def gradients(call, inputs, wanted):
    inputs = [x.clone().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
    out = call(*inputs)
    sum(x.float().pow(2).sum() for x in (out if isinstance(out, tuple) else (out,))).backward()
    return [x.grad for x in inputs]


def check_each_choice(call, inputs, backward_op, monkeypatch):
    """Of the inputs that require a gradient, one at least."""
    made = []
    kernel = backward_op.kernel
    monkeypatch.setattr(backward_op, "kernel", lambda *a: made.append(kernel(*a)) or made[-1])
    all_of_them = gradients(call, inputs, [True] * len(inputs))
    for wanted in product([False, True], repeat=len(inputs)):
        if not any(wanted):
            continue
        found = gradients(call, inputs, wanted)
        for x, expected, w in zip(found, all_of_them, wanted, strict=True):
            assert torch.equal(x, expected) if w else x is None
        yield wanted, made[-1]


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_frozen_q_k_or_v(backend, backend_device, monkeypatch):
    device = backend_device(backend)
    dtype = torch.float16 if backend == "cuda" else torch.float32
    layout = ThreeRegionLayout(torch.tensor([[0, 1, 9, 14]], device=device), 4, 2, 0.5)
    inputs = [torch.randn(1, heads, 23, 32, device=device, dtype=dtype) for heads in (2, 1, 1)]
    call = lambda q, k, v: three_region_attention(q, k, v, layout, backend=backend)  # noqa: E731
    for wanted, made in check_each_choice(call, inputs, three_region_attention_backward_op, monkeypatch):
        assert tuple(x.numel() > 0 for x in made) == wanted


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_frozen_parameters_of_norms(backend, backend_device, monkeypatch):
    device = backend_device(backend)
    rows, weight, bias = (torch.randn(*shape, device=device) for shape in ((5, 8), (8,), (8,)))
    call = lambda x, w, b: layer_norm(x, w, b, backend=backend)  # noqa: E731
    for wanted, made in check_each_choice(call, (rows, weight, bias), layer_norm_backward_op, monkeypatch):
        assert tuple(x.numel() > 0 for x in made[1:]) == wanted[1:]
    call = lambda w, b, c, d: sandwich_layer_norm(rows, rows, w, b, c, d, backend=backend)  # noqa: E731
    parameters = weight, bias, weight + 1, bias + 1
    for wanted, made in check_each_choice(call, parameters, sandwich_layer_norm_backward_op, monkeypatch):
        assert tuple(x.numel() > 0 for x in made[2:]) == wanted
    call = lambda x, w: rms_norm(x, w, backend=backend)  # noqa: E731
    for wanted, made in check_each_choice(call, (rows, weight), rms_norm_backward_op, monkeypatch):
        assert (made[1].numel() > 0) == wanted[1]
    call = lambda w, c: sandwich_rms_norm(rows, rows, w, c, backend=backend)  # noqa: E731
    for wanted, made in check_each_choice(call, (weight, bias), sandwich_rms_norm_backward_op, monkeypatch):
        assert tuple(x.numel() > 0 for x in made[2:]) == wanted


@pytest.mark.parametrize("weights_wanted", [True, False])
def test_triton_norms_sum_nothing_for_frozen_parameters(weights_wanted, backend_device, monkeypatch):
    """Each program of a backward pass would leave its sums in memory, [programs, slots, C]."""
    device = backend_device("triton")
    rows, others = torch.randn(2, 5, 8, device=device, requires_grad=True)
    parameters = torch.randn(4, 8, device=device).requires_grad_(weights_wanted).unbind()
    empty, sums = torch.empty, []
    calls = {
        "layer_norm": lambda: layer_norm(rows, *parameters[:2], backend="triton"),
        "rms_norm": lambda: rms_norm(rows, parameters[0], backend="triton"),
        "sandwich_layer_norm": lambda: sandwich_layer_norm(rows, others, *parameters, backend="triton")[1],
        "sandwich_rms_norm": lambda: sandwich_rms_norm(rows, others, *parameters[:2], backend="triton")[1],
    }
    results = {op: call().sum() for op, call in calls.items()}
    monkeypatch.setattr(torch, "empty", lambda *size, **o: sums.append(size) or empty(*size, **o))
    slots = []
    for op, result in results.items():
        sums.clear()
        result.backward()
        slots += [(op, size[0][1]) for size in sums if len(size) == 1 and len(size[0]) == 3]
    expected = {"layer_norm": 2, "rms_norm": 1, "sandwich_layer_norm": 4, "sandwich_rms_norm": 2}
    assert slots == (list(expected.items()) if weights_wanted else [])


def test_under_compile_too():
    layout = ThreeRegionLayout(torch.tensor([[0, 1, 9, 14]]), 4, 2, 0.5)
    compiled = torch.compile(three_region_attention, fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(1, 2, 23, 32) for _ in range(3)]
    found = gradients(lambda *x: compiled(*x, layout), inputs, (False, True, False))
    expected = gradients(lambda *x: three_region_attention(*x, layout), inputs, (True, True, True))
    assert found[0] is found[2] is None and torch.equal(found[1], expected[1])
