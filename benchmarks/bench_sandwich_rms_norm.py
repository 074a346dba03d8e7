# SPDX-License-Identifier: Apache-2.0
"""sandwich_rms_norm: RMSNorm, addition and RMSNorm over rows of the model's width."""

from __future__ import annotations

import torch

from benchmarks import shapes
from benchmarks.definitions import BACKWARD, FORWARD, Benchmark, Case, Inputs, Work
from benchmarks.rivals import norms
from cogview_kernels import sandwich_rms_norm

NAMES = ("branch", "residual", "post_weight", "pre_weight")


def cases(device: torch.device, tiny: bool) -> list[Case]:
    chosen = shapes.ROWS.on(device, tiny)
    dtypes = shapes.GPU_DTYPES if device.type == "cuda" else shapes.CPU_DTYPES
    return [Case(s, dtype, way) for dtype in dtypes for s in chosen for way in (FORWARD, BACKWARD)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    N, C = case.shape.N, case.shape.C
    rows = [torch.randn(N, C, device=device).to(case.dtype) for _ in range(4)]
    weights = [torch.randn(C, device=device).to(case.dtype) for _ in range(2)]
    values = dict(zip(NAMES, [*rows[:2], *weights], strict=True))
    return Inputs(values, NAMES, tuple(rows[2:]))


def truth(inputs: Inputs, case: Case):
    wide = inputs.float_copy()
    return wide, lambda: sandwich_rms_norm(*wide.values.values(), eps=norms.RMS_EPS, backend="reference")


def work(case: Case, inputs: Inputs) -> Work:
    tensor = inputs.branch.numel() * inputs.branch.element_size()
    if case.direction == BACKWARD:
        formula = "bytes of branch, residual_out, dresidual_out, dnormed read, dbranch, dresidual written"
        return Work(6 * tensor, "copy", formula)
    return Work(4 * tensor, "copy", "bytes of branch, residual read, residual_out, normed written")


BENCHMARK = Benchmark(
    op="sandwich_rms_norm",
    cases=cases,
    inputs=make_inputs,
    truths={"op": truth},
    backends=("triton", "cuda", "cpu"),
    call=lambda op, x: op(*x.values.values(), eps=norms.RMS_EPS),
    rivals=norms.RMS_SANDWICH,
    work=work,
    baseline="eager",
)
