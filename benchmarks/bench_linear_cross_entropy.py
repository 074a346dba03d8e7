# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy over the whole vocabulary, against what holds its logits and what does not."""

from __future__ import annotations

import pytest
import torch

from benchmarks import shapes
from benchmarks.conftest import CLOCK
from benchmarks.harness import BOTH, FORWARD, Benchmark, Case, Inputs, Variant, Work, backends
from benchmarks.rivals import cross_entropy
from cogview_kernels import _backends, linear_cross_entropy
from cogview_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference


def cases(device: torch.device, tiny: bool) -> list[Case]:
    chosen = shapes.choose(shapes.LOSS, shapes.LOSS_CPU, shapes.LOSS_TINY, device.type, tiny)
    dtypes = (torch.bfloat16, torch.float16) if device.type == "cuda" else shapes.CPU_DTYPES
    return [Case(s, dtype, way) for dtype in dtypes for s in chosen for way in (BOTH, FORWARD)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    s = case.shape
    # Logits of standard deviation 1: early in training, when no softmax is yet near one.
    hidden, weight = torch.randn(s.N, s.C, device=device), s.C**-0.5 * torch.randn(s.V, s.C, device=device)
    values = {"hidden": hidden.to(case.dtype), "weight": weight.to(case.dtype)}
    values["target"] = torch.randint(0, s.V, (s.N,), device=device)
    return Inputs(values, ("hidden", "weight"), (torch.ones((), device=device),))


def truth(inputs: Inputs, case: Case):
    hidden, weight = (inputs.values[x].detach().float().requires_grad_() for x in ("hidden", "weight"))
    some = Inputs({"hidden": hidden, "weight": weight}, ("hidden", "weight"), inputs.douts)
    return some, lambda: linear_cross_entropy_reference(hidden, weight, inputs.target)


def bare(inputs: Inputs, case: Case):
    some, _ = truth(inputs, case)
    return some, cross_entropy._bare(some, case)


def work(case: Case, inputs: Inputs) -> Work:
    s, products = case.shape, 1 if case.direction == FORWARD else 3
    formula = f"{2 * products} N C V, {products} matrix product{'s' if products > 1 else ''}"
    return Work(2 * products * s.N * s.C * s.V, "matmul", formula)


def _route(fused: tuple[bool, bool]) -> Variant:
    """The triton backend with one of its routes forced; see ``FUSED`` in its kernels."""

    def prepare(inputs: Inputs, case: Case):
        from cogview_kernels.linear_cross_entropy import triton_kernels

        def call():
            default = triton_kernels.FUSED
            triton_kernels.FUSED = fused
            try:
                return linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, backend="triton")
            finally:
                triton_kernels.FUSED = default

        return call

    name = "triton, fused" if fused[0] else "triton, products"
    reason = lambda case, device: _backends.why_not("triton", device)  # noqa: E731
    return Variant(name, prepare, kind="backend", why_not=reason)


BENCHMARK = Benchmark(
    op="linear_cross_entropy",
    cases=cases,
    inputs=make_inputs,
    truths={"op": truth, "bare": bare},
    variants=(
        *backends("linear_cross_entropy", lambda op, x: op(x.hidden, x.weight, x.target)),
        _route((False, False)),
        _route((True, True)),
        *cross_entropy.VARIANTS,
    ),
    work=work,
    baseline=cross_entropy.EAGER,
)


@pytest.mark.benchmark(timer=CLOCK)
def test_linear_cross_entropy(replay, case, variant):
    replay(case, variant)
