# SPDX-License-Identifier: Apache-2.0
"""decode_attention: one new query per sequence against a full cache, over all keys and over three regions."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import shapes
from benchmarks.conftest import CLOCK
from benchmarks.harness import FORWARD, Benchmark, Case, Inputs, Work, backends
from benchmarks.rivals import decode
from cogview_kernels import ThreeRegionLayout
from cogview_kernels.decode_attention.reference import decode_attention_reference


def cases(device: torch.device, tiny: bool) -> list[Case]:
    chosen = shapes.choose(shapes.DECODE, shapes.DECODE_CPU, shapes.DECODE_TINY, device.type, tiny)
    dtypes = shapes.GPU_DTYPES[:2] if device.type == "cuda" else shapes.CPU_DTYPES
    return [Case(s, dtype, FORWARD) for dtype in dtypes for s in chosen]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    s = case.shape
    q = torch.randn(s.B, s.H, 1, s.D, device=device).to(case.dtype)
    k, v = (torch.randn(s.B, s.H, s.S, s.D, device=device).to(case.dtype) for _ in range(2))
    text = torch.zeros(s.B, s.S, dtype=torch.bool, device=device)
    text[:, : s.text] = True
    layout = ThreeRegionLayout.sample(text, s.P, block_size=s.w, window_blocks=s.W) if s.regions else None
    lengths = torch.full((s.B,), s.S, device=device)
    return Inputs({"q": q, "k_cache": k, "v_cache": v, "lengths": lengths, "layout": layout})


def truth(inputs: Inputs, case: Case, *, dense: bool):
    x, layout = inputs, inputs.layout
    regions = ()
    if layout is not None and not dense:
        regions = (layout.pivots, layout.block_size, layout.window_blocks, layout.pivot_bias)
    scale = case.shape.D**-0.5
    return x, lambda: decode_attention_reference(
        x.q.float(), x.k_cache.float(), x.v_cache.float(), x.lengths, scale, *regions
    )


def work(case: Case, inputs: Inputs) -> Work:
    s, keys = case.shape, float(case.shape.S)
    if s.regions:
        left = ((s.S - 1) // s.w - s.W + 1) * s.w
        pivots = inputs.layout.pivots
        keys = float(((pivots >= 0) & (pivots < left)).sum(1).float().mean()) + s.S - max(left, 0)
    moved = 2 * s.B * s.H * keys * s.D * inputs.q.element_size()
    return Work(moved, "copy", f"bytes of the keys and values that are seen ({keys:.0f} a head)")


BENCHMARK = Benchmark(
    op="decode_attention",
    cases=cases,
    inputs=make_inputs,
    truths={"op": functools.partial(truth, dense=False), "dense": functools.partial(truth, dense=True)},
    variants=(
        *backends(
            "decode_attention", lambda op, x: op(x.q, x.k_cache, x.v_cache, x.lengths, layout=x.layout)
        ),
        *decode.VARIANTS,
    ),
    work=work,
    baseline=decode.CACHE,
)


@pytest.mark.benchmark(timer=CLOCK)
def test_decode_attention(replay, case, variant):
    replay(case, variant)
