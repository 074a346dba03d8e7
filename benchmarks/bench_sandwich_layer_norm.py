# SPDX-License-Identifier: Apache-2.0
"""sandwich_layer_norm: LayerNorm, addition and LayerNorm over rows of the model's width."""

from __future__ import annotations

import pytest
import torch

from benchmarks import shapes
from benchmarks.conftest import CLOCK
from benchmarks.harness import BACKWARD, FORWARD, Benchmark, Case, Inputs, Work, backends
from benchmarks.rivals import norms
from cogview_kernels.sandwich_layer_norm.reference import sandwich_layer_norm_reference

NAMES = ("branch", "residual", "post_weight", "post_bias", "pre_weight", "pre_bias")


def cases(device: torch.device, tiny: bool) -> list[Case]:
    chosen = shapes.choose(shapes.ROWS, shapes.ROWS_CPU, shapes.ROWS_TINY, device.type, tiny)
    dtypes = shapes.GPU_DTYPES if device.type == "cuda" else shapes.CPU_DTYPES
    return [Case(s, dtype, way) for dtype in dtypes for s in chosen for way in (FORWARD, BACKWARD)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    N, C = case.shape.N, case.shape.C
    rows = [torch.randn(N, C, device=device).to(case.dtype) for _ in range(4)]
    parameters = [torch.randn(C, device=device).to(case.dtype) for _ in range(4)]
    values = dict(zip(NAMES, [*rows[:2], *parameters], strict=True))
    return Inputs(values, NAMES, tuple(rows[2:]))


def truth(inputs: Inputs, case: Case):
    wide = inputs.float_copy()
    return wide, lambda: sandwich_layer_norm_reference(*wide.values.values(), eps=norms.EPS)


def work(case: Case, inputs: Inputs) -> Work:
    tensor = inputs.branch.numel() * inputs.branch.element_size()
    if case.direction == BACKWARD:
        formula = "bytes of branch, residual_out, dresidual_out, dnormed read, dbranch, dresidual written"
        return Work(6 * tensor, "copy", formula)
    return Work(4 * tensor, "copy", "bytes of branch, residual read, residual_out, normed written")


BENCHMARK = Benchmark(
    op="sandwich_layer_norm",
    cases=cases,
    inputs=make_inputs,
    truths={"op": truth},
    variants=(
        *backends("sandwich_layer_norm", lambda op, x: op(*x.values.values(), eps=norms.EPS), norms.BACKENDS),
        *norms.SANDWICH,
    ),
    work=work,
    baseline="eager PB-relax",
)


@pytest.mark.benchmark(timer=CLOCK)
def test_sandwich_layer_norm(replay, case, variant):
    replay(case, variant)
