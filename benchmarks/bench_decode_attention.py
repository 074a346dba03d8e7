# SPDX-License-Identifier: Apache-2.0
"""decode_attention: one new query per sequence against a full cache, over all keys and over three regions."""

from __future__ import annotations

import functools

import torch

from benchmarks import shapes
from benchmarks.definitions import FORWARD, Benchmark, Case, Inputs, Work
from benchmarks.rivals import decode
from cogview_kernels import decode_attention


def cases(device: torch.device, tiny: bool) -> list[Case]:
    chosen = shapes.DECODE.on(device, tiny)
    dtypes = shapes.GPU_DTYPES[:2] if device.type == "cuda" else shapes.CPU_DTYPES
    return [Case(s, dtype, FORWARD) for dtype in dtypes for s in chosen]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    s = case.shape
    q = torch.randn(s.B, s.H, 1, s.D, device=device).to(case.dtype)
    k, v = (torch.randn(s.B, s.H, s.S, s.D, device=device).to(case.dtype) for _ in range(2))
    layout = s.regions.sample(s.B, s.S, device) if s.regions else None
    lengths = torch.full((s.B,), s.S, device=device)
    return Inputs({"q": q, "k_cache": k, "v_cache": v, "lengths": lengths, "layout": layout})


def truth(inputs: Inputs, case: Case, *, dense: bool):
    q, k_cache, v_cache = (x.float() for x in (inputs.q, inputs.k_cache, inputs.v_cache))
    layout = None if dense else inputs.layout
    return inputs, lambda: decode_attention(
        q, k_cache, v_cache, inputs.lengths, layout=layout, backend="reference"
    )


def work(case: Case, inputs: Inputs) -> Work:
    s, keys = case.shape, float(case.shape.S)
    if s.regions:
        window_start = s.regions.window_start(s.S - 1)
        pivots = inputs.layout.pivots
        far = (pivots >= 0) & (pivots < window_start)
        keys = float(far.sum(1).float().mean()) + s.S - window_start
    moved = 2 * s.B * s.H * keys * s.D * inputs.q.element_size()
    return Work(moved, "copy", f"bytes of the keys and values that are seen ({keys:.0f} a head)")


BENCHMARK = Benchmark(
    op="decode_attention",
    cases=cases,
    inputs=make_inputs,
    truths={"op": functools.partial(truth, dense=False), "dense": functools.partial(truth, dense=True)},
    backends=("cpu", "triton", "cuda", "sdpa"),
    call=lambda op, x: op(x.q, x.k_cache, x.v_cache, x.lengths, layout=x.layout),
    rivals=decode.VARIANTS,
    work=work,
    baseline=decode.CACHE,
)
