# SPDX-License-Identifier: Apache-2.0
"""decode_step: all layers of a step against the same layers op by op."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.definitions import FORWARD, Benchmark, Case, Inputs, Work
from benchmarks.rivals import step
from cogview_kernels import LayerStack, LayerWeights, decode_step


def cases(device: torch.device, tiny: bool) -> list[Case]:
    """On a GPU there is no kernel: a step is a CUDA graph of the ops there."""
    chosen = () if device.type == "cuda" else shapes.DECODE_STEP.on(device, tiny)
    return [Case(s, dtype, FORWARD) for dtype in shapes.CPU_DTYPES for s in chosen]


def _stack(s: shapes.DecodeStepShape, dtype: torch.dtype) -> LayerStack:
    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        return (torch.randn(outputs, inputs) / inputs**0.5).to(dtype), torch.randn(outputs).to(dtype)

    def norm() -> tuple[Tensor, Tensor]:
        return (1 + torch.rand(s.C)).to(dtype), torch.randn(s.C).to(dtype)

    def layer() -> LayerWeights:
        attention = norm(), linear(3 * s.C, s.C), linear(s.C, s.C), norm()
        return LayerWeights(*attention, norm(), linear(4 * s.C, s.C), linear(s.C, 4 * s.C), norm())

    return LayerStack(tuple(layer() for _ in range(s.layers)), norm(), pb_relax=None)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """The cache is nearly full."""
    s = case.shape
    cache = torch.randn(s.layers, 2, s.B, s.H, s.S, s.C // s.H).to(case.dtype)
    lengths = torch.full((s.B,), s.S - s.T)
    x = torch.randn(s.B, s.T, s.C).to(case.dtype)
    return Inputs({"x": x, "stack": _stack(s, case.dtype), "cache": cache, "lengths": lengths})


def call(function, x: Inputs):
    return function(x.x, x.stack, x.cache, x.lengths)


def truth(inputs: Inputs, case: Case):
    wide = inputs.stack.map(lambda tensor: tensor.float())
    values = {"x": inputs.x.float(), "stack": wide, "cache": inputs.cache.float(), "lengths": inputs.lengths}
    some = Inputs(values)
    return some, lambda: decode_step(some.x, wide, some.cache, some.lengths, backend="reference")


def work(case: Case, inputs: Inputs) -> Work:
    tensors = [*inputs.stack.tensors, inputs.cache]
    return Work(sum(x.numel() * x.element_size() for x in tensors), "copy", "bytes of weights and cache read")


BENCHMARK = Benchmark(
    op="decode_step",
    cases=cases,
    inputs=make_inputs,
    truths={"op": truth},
    backends=("cpu",),
    call=call,
    rivals=step.VARIANTS,
    work=work,
    baseline=step.PLAIN,
)
