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
    """On a GPU the op is the rival itself."""
    chosen = () if device.type == "cuda" else shapes.LINEAR.on(device, tiny)
    return [Case(s, dtype, FORWARD) for dtype in shapes.CPU_DTYPES for s in chosen]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    s = case.shape
    x = torch.randn(s.N, s.K, device=device).to(case.dtype)
    weights = [torch.randn(s.O, s.K, device=device).to(case.dtype) / s.K**0.5 for _ in range(s.layers)]
    return Inputs({"x": x, "weights": weights, "bias": torch.randn(s.O, device=device).to(case.dtype)})


def through_all(function, x: Inputs):
    """The sum of all layers' outputs, which costs little, as one result."""
    return functools.reduce(
        torch.add, (function(x.x, weight, x.bias, activation="gelu_tanh") for weight in x.weights)
    )


def truth(inputs: Inputs, case: Case):
    wide = {name: inputs.values[name].float() for name in ("x", "bias")}
    some = Inputs({**wide, "weights": [weight.float() for weight in inputs.weights]})
    return some, lambda: through_all(functools.partial(decode_linear, backend="reference"), some)


def work(case: Case, inputs: Inputs) -> Work:
    read = sum(weight.numel() * weight.element_size() for weight in inputs.weights)
    return Work(read, "copy", "bytes of the weights read")


BENCHMARK = Benchmark(
    op="decode_linear",
    cases=cases,
    inputs=make_inputs,
    truths={"op": truth},
    backends=("cpu",),
    call=through_all,
    rivals=linear.VARIANTS,
    work=work,
    baseline=linear.PLAIN,
)
