# SPDX-License-Identifier: Apache-2.0
"""local_attention_2d against dense attention under the same mask, FlexAttention, and unfolded windows."""

from __future__ import annotations

import torch

from benchmarks import shapes
from benchmarks.definitions import BACKWARD, BOTH, FORWARD, Benchmark, Case, Inputs, Work
from benchmarks.rivals import local_attention
from cogview_kernels import local_attention_2d

_LEAVES = ("q", "k", "v", "extra_k", "extra_v")


def cases(device: torch.device, tiny: bool) -> list[Case]:
    chosen = shapes.LOCAL.on(device, tiny)
    if device.type == "cuda":
        return [Case(s, torch.bfloat16, way) for s in chosen for way in (FORWARD, BACKWARD, BOTH)]
    return [Case(s, d, way) for s in chosen for d in shapes.CPU_DTYPES for way in (FORWARD, BOTH)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    s = case.shape
    lengths = {"q": s.T, "k": s.T, "v": s.T, "extra_k": s.E, "extra_v": s.E, "dout": s.T}
    tensors = {
        name: torch.randn(s.B, s.H, n, s.D, device=device).to(case.dtype) for name, n in lengths.items()
    }
    dout = tensors.pop("dout")
    return Inputs({**tensors, "grid": s.grid, "kernel_size": s.kernel_size}, _LEAVES, (dout,))


def call(op, x: Inputs):
    return op(x.q, x.k, x.v, x.grid, x.kernel_size, extra_k=x.extra_k, extra_v=x.extra_v)


def part(results: tuple[torch.Tensor, ...], case: Case) -> tuple[torch.Tensor, ...]:
    """One head of the first and of the last sample: heads do not mix."""
    return tuple(torch.stack([x[0, 0], x[-1, -1]])[:, None] for x in results)


def truth(inputs: Inputs, case: Case):
    tensors = part(tuple(x.detach().float() for x in (*inputs.differentiated(), *inputs.douts)), case)
    leaves = dict(zip(_LEAVES, (x.requires_grad_() for x in tensors[:-1]), strict=True))
    some = Inputs({**leaves, "grid": inputs.grid, "kernel_size": inputs.kernel_size}, _LEAVES, (tensors[-1],))
    return some, lambda: call(
        lambda *a, **options: local_attention_2d(*a, **options, backend="reference"), some
    )


_FACTOR = {FORWARD: 4, BACKWARD: 10, BOTH: 14}


def _seen(length: int, kernel: int) -> int:
    """Pairs of places on a line that are at most ``kernel // 2`` apart."""
    return sum(min(length, i + kernel // 2 + 1) - max(0, i - kernel // 2) for i in range(length))


def work(case: Case, inputs: Inputs) -> Work:
    s = case.shape
    pairs = _seen(s.grid[0], s.kernel_size[0]) * _seen(s.grid[1], s.kernel_size[1]) + s.T * s.E
    formula = f"{_FACTOR[case.direction]} B H D x visible pairs ({pairs} a head)"
    return Work(_FACTOR[case.direction] * s.B * s.H * s.D * pairs, "matmul", formula)


BENCHMARK = Benchmark(
    op="local_attention_2d",
    cases=cases,
    inputs=make_inputs,
    truths={"op": truth},
    backends=("triton", "cpu", "sdpa"),
    call=call,
    rivals=local_attention.VARIANTS,
    work=work,
    baseline=local_attention.DENSE,
    part=part,
)
