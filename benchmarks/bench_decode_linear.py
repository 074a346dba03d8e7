# SPDX-License-Identifier: Apache-2.0
"""decode_linear: the matrices of several layers in turn, so that their weights come from memory."""

from __future__ import annotations

import functools

import torch

from benchmarks import shapes
from benchmarks.definitions import FORWARD, Benchmark, Case, Inputs, Work
from benchmarks.rivals import linear
from cogview_kernels import decode_linear


def cases(device: torch.device, tiny: bool) -> list[Case]:
    dtypes = shapes.GPU_DTYPES if device.type == "cuda" else shapes.CPU_DTYPES
    return [Case(s, dtype, FORWARD) for dtype in dtypes for s in shapes.LINEAR.on(device, tiny)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    s = case.shape
    x = torch.randn(s.N, s.K, device=device).to(case.dtype)
    weights = [torch.randn(s.O, s.K, device=device).to(case.dtype) / s.K**0.5 for _ in range(s.layers)]
    bias = torch.randn(s.O, device=device).to(case.dtype)
    return Inputs({"x": x, "weights": weights, "bias": bias, "activation": s.activation})


def through_all(function, x: Inputs):
    return tuple(function(x.x, weight, x.bias, activation=x.activation) for weight in x.weights)


def truth(inputs: Inputs, case: Case):
    wide = {name: inputs.values[name].float() for name in ("x", "bias")}
    wide["weights"] = [weight.float() for weight in inputs.weights]
    some = Inputs({**inputs.values, **wide})
    return some, lambda: through_all(functools.partial(decode_linear, backend="reference"), some)


def work(case: Case, inputs: Inputs) -> Work:
    read = sum(weight.numel() * weight.element_size() for weight in inputs.weights)
    return Work(read, "copy", "bytes of the weights read")


BENCHMARK = Benchmark(
    op="decode_linear",
    cases=cases,
    inputs=make_inputs,
    truths={"op": truth},
    backends=("cpu", "triton"),
    call=through_all,
    rivals=linear.VARIANTS,
    work=work,
    baseline=linear.PLAIN,
)
