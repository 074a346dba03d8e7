# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy over CogView's vocabulary, mean over all tokens."""

from __future__ import annotations

import functools

import torch

from benchmarks import shapes
from benchmarks.definitions import BOTH, FORWARD, Benchmark, Case, Inputs, Variant, Work
from benchmarks.rivals import cross_entropy
from cogview_kernels import _backends, linear_cross_entropy


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
    values = {"hidden": hidden, "weight": weight, "target": target, "options": {}}
    if not case.shape.options:
        return Inputs(values, ("hidden", "weight"), (dloss,))
    values["bias"] = torch.randn(V, device=device).to(case.dtype)
    values["options"] = cross_entropy.OPTIONS
    return Inputs(values, ("hidden", "weight", "bias"), (dloss,))


def truth(inputs: Inputs, case: Case):
    wide = inputs.float_copy()
    return wide, lambda: call(functools.partial(linear_cross_entropy, backend="reference"), wide)


def work(case: Case, inputs: Inputs) -> Work:
    s = case.shape
    products = 1 if case.direction == FORWARD else 3
    return Work(2 * products * s.N * s.C * s.V, "matmul", f"{2 * products} N C V: {products} matrix products")


def call(op, x: Inputs):
    return op(x.hidden, x.weight, x.target, bias=x.values.get("bias"), **x.options)


def in_memory(backend: str, share: float) -> Variant:
    """What more memory than one piece saves."""
    function = functools.partial(linear_cross_entropy, backend=backend, extra_memory=share)

    def why_not(case: Case, device: torch.device) -> str:
        if case.direction == FORWARD:
            return "memory is traded for time where there are gradients"
        return _backends.why_not(backend, device)

    return Variant(
        f"{backend}, extra_memory={share:g}",
        lambda x, case: lambda: call(function, x),
        kind="option",
        why_not=why_not,
    )


BENCHMARK = Benchmark(
    op="linear_cross_entropy",
    cases=cases,
    inputs=make_inputs,
    truths={"op": truth},
    backends=("triton", "cpu", "chunked"),
    call=call,
    rivals=(
        *(in_memory("triton", share) for share in (0.12, 0.5, 1)),
        *(in_memory("cpu", share) for share in (0.25, 1)),
        *cross_entropy.VARIANTS,
    ),
    work=work,
    baseline="eager",
)
