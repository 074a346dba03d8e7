# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy over CogView's vocabulary, mean over all tokens."""

from __future__ import annotations

import torch

from benchmarks import shapes
from benchmarks.definitions import BOTH, FORWARD, Benchmark, Case, Inputs, Work
from benchmarks.rivals import cross_entropy
from cogview_kernels import linear_cross_entropy


def cases(device: torch.device, tiny: bool) -> list[Case]:
    chosen = shapes.LOSS.on(device, tiny)
    dtypes = shapes.GPU_DTYPES if device.type == "cuda" else shapes.CPU_DTYPES
    return [Case(s, dtype, way) for dtype in dtypes for s in chosen for way in (BOTH, FORWARD)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    N, C, V = case.shape.N, case.shape.C, case.shape.V
    hidden = torch.randn(N, C, device=device).to(case.dtype)
    weight = (torch.randn(V, C, device=device) * C**-0.5).to(case.dtype)
    target = torch.randint(V, (N,), device=device)
    dloss = torch.ones((), device=device)
    return Inputs({"hidden": hidden, "weight": weight, "target": target}, ("hidden", "weight"), (dloss,))


def truth(inputs: Inputs, case: Case):
    wide = inputs.float_copy()
    return wide, lambda: linear_cross_entropy(wide.hidden, wide.weight, wide.target, backend="reference")


def work(case: Case, inputs: Inputs) -> Work:
    s = case.shape
    products = 1 if case.direction == FORWARD else 3
    return Work(2 * products * s.N * s.C * s.V, "matmul", f"{2 * products} N C V: {products} matrix products")


BENCHMARK = Benchmark(
    op="linear_cross_entropy",
    cases=cases,
    inputs=make_inputs,
    truths={"op": truth},
    backends=("triton", "cpu", "chunked"),
    call=lambda op, x: op(x.hidden, x.weight, x.target),
    rivals=cross_entropy.VARIANTS,
    work=work,
    baseline="eager",
)
