# SPDX-License-Identifier: Apache-2.0
"""rms_norm over rows of the model's width."""

from __future__ import annotations

import torch

from benchmarks import shapes
from benchmarks.definitions import BACKWARD, FORWARD, Benchmark, Case, Inputs, Work
from benchmarks.rivals import norms
from cogview_kernels import rms_norm


def cases(device: torch.device, tiny: bool) -> list[Case]:
    chosen = shapes.ROWS.on(device, tiny)
    dtypes = shapes.GPU_DTYPES if device.type == "cuda" else shapes.CPU_DTYPES
    return [Case(s, dtype, way) for dtype in dtypes for s in chosen for way in (FORWARD, BACKWARD)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    N, C = case.shape.N, case.shape.C
    x, dout = (torch.randn(N, C, device=device).to(case.dtype) for _ in range(2))
    weight = torch.randn(C, device=device).to(case.dtype)
    return Inputs({"x": x, "weight": weight}, ("x", "weight"), (dout,))


def truth(inputs: Inputs, case: Case):
    wide = inputs.float_copy()
    return wide, lambda: rms_norm(wide.x, wide.weight, eps=norms.RMS_EPS, backend="reference")


def work(case: Case, inputs: Inputs) -> Work:
    tensor = inputs.x.numel() * inputs.x.element_size()
    if case.direction == BACKWARD:
        return Work(3 * tensor, "copy", "bytes of x and dout read, dx written")
    return Work(2 * tensor, "copy", "bytes of x read, out written")


BENCHMARK = Benchmark(
    op="rms_norm",
    cases=cases,
    inputs=make_inputs,
    truths={"op": truth},
    backends=("triton", "cuda", "cpu"),
    call=lambda op, x: op(x.x, x.weight, eps=norms.RMS_EPS),
    rivals=norms.RMS_SINGLE,
    work=work,
    baseline="eager",
)
