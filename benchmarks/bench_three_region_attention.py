# SPDX-License-Identifier: Apache-2.0
"""three_region_attention against dense attention and against every way to this mask without the library."""

from __future__ import annotations

import dataclasses
import functools

import torch

from benchmarks import shapes
from benchmarks.definitions import BACKWARD, BOTH, FORWARD, Benchmark, Case, Inputs, Work
from benchmarks.rivals import attention
from cogview_kernels import three_region_attention


def cases(device: torch.device, tiny: bool) -> list[Case]:
    chosen = shapes.ATTENTION.on(device, tiny)
    if device.type == "cuda":
        ways = (FORWARD, BACKWARD, BOTH)
        found = [Case(s, torch.bfloat16, way) for s in chosen for way in ways]
        return found + [Case(chosen[0], d, way) for d in (torch.float16, torch.float32) for way in ways]
    return [Case(s, d, way) for s in chosen for d in shapes.CPU_DTYPES for way in (FORWARD, BOTH)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    s = case.shape
    q, k, v, dout = (torch.randn(s.B, s.H, s.T, s.D, device=device).to(case.dtype) for _ in range(4))
    return Inputs(
        {"q": q, "k": k, "v": v, "layout": s.regions.sample(s.B, s.T, device)}, ("q", "k", "v"), (dout,)
    )


def part(results: tuple[torch.Tensor, ...], case: Case) -> tuple[torch.Tensor, ...]:
    """One head of the first and of the last sample: heads do not mix."""
    return tuple(torch.stack([x[0, 0], x[-1, -1]])[:, None] for x in results)


def truth(inputs: Inputs, case: Case, *, dense: bool):
    q, k, v, dout = (x.detach().float() for x in part((inputs.q, inputs.k, inputs.v, *inputs.douts), case))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    some = Inputs(dict(zip("qkv", leaves, strict=True)), ("q", "k", "v"), (dout,))
    layout = dataclasses.replace(inputs.layout, pivots=inputs.layout.pivots[[0, -1]])
    if dense:
        layout = dataclasses.replace(layout, window_blocks=-(-case.shape.T // layout.block_size))
    return some, lambda: three_region_attention(q, k, v, layout, backend="reference")


_FACTOR = {FORWARD: 4, BACKWARD: 10, BOTH: 14}


def work(case: Case, inputs: Inputs) -> Work:
    s = case.shape
    pairs = inputs.layout.plan(s.T).keys_per_query * s.T
    formula = f"{_FACTOR[case.direction]} B H D x visible pairs ({pairs:.0f} a head)"
    return Work(_FACTOR[case.direction] * s.B * s.H * s.D * pairs, "matmul", formula)


def dense_work(case: Case, inputs: Inputs) -> Work:
    s = case.shape
    formula = f"{_FACTOR[case.direction]} B H D x T (T+1) / 2 causal pairs"
    return Work(_FACTOR[case.direction] * s.B * s.H * s.D * s.T * (s.T + 1) / 2, "matmul", formula)


BENCHMARK = Benchmark(
    op="three_region_attention",
    cases=cases,
    inputs=make_inputs,
    truths={"op": functools.partial(truth, dense=False), "dense": functools.partial(truth, dense=True)},
    backends=("triton", "cuda", "cpu", "sdpa"),
    call=lambda op, x: op(x.q, x.k, x.v, x.layout),
    rivals=(
        *(dataclasses.replace(variant, work=dense_work) for variant in attention.DENSE_VARIANTS),
        *attention.SPARSE_VARIANTS,
    ),
    work=work,
    baseline=attention.DENSE,
    part=part,
)
