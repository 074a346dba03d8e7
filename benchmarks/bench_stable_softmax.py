# SPDX-License-Identifier: Apache-2.0
"""stable_softmax: rows of the model's width, of the vocabulary, and causal attention scores."""

from __future__ import annotations

import torch

from benchmarks import shapes
from benchmarks.definitions import BACKWARD, FORWARD, Benchmark, Case, Inputs, Work
from benchmarks.rivals import softmax
from cogview_kernels import stable_softmax

ALPHA = 2.0
CHECKED_ROWS = 256


def cases(device: torch.device, tiny: bool) -> list[Case]:
    chosen = shapes.SOFTMAX.on(device, tiny)
    dtypes = shapes.GPU_DTYPES if device.type == "cuda" else shapes.CPU_DTYPES
    return [Case(s, dtype, way) for dtype in dtypes for s in chosen for way in (FORWARD, BACKWARD)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    shape, mask = case.shape, None
    size = (shape.N, shape.C) if hasattr(shape, "C") else (shape.B, shape.H, shape.T, shape.T)
    scores = torch.randn(size, device=device).to(case.dtype)
    if len(size) == 4:
        mask = torch.ones(shape.T, shape.T, dtype=torch.bool, device=device).tril()
    values = {"scores": scores, "mask": mask, "alpha": ALPHA, "causal": mask is not None}
    return Inputs(values, ("scores",), (torch.randn_like(scores),))


def part(results: tuple[torch.Tensor, ...], case: Case) -> tuple[torch.Tensor, ...]:
    rows = slice(None, CHECKED_ROWS)
    return tuple(x[rows] if x.dim() == 2 else x[:1, :1] for x in results)


def truth(inputs: Inputs, case: Case):
    scores, dprobs = (x.detach().float() for x in part((inputs.scores, *inputs.douts), case))
    some = Inputs({"scores": scores.requires_grad_()}, ("scores",), (dprobs,))
    return some, lambda: stable_softmax(scores, alpha=ALPHA, causal=inputs.causal, backend="reference")


def work(case: Case, inputs: Inputs) -> Work:
    tensor = inputs.scores.numel() * inputs.scores.element_size()
    if case.direction == BACKWARD:
        return Work(3 * tensor, "copy", "bytes of dprobs and probs read, dscores written")
    if inputs.causal:  # the upper triangle need not be read, but its zeros must be written
        return Work(1.5 * tensor, "copy", "bytes of the scores' lower triangle read, probs written")
    return Work(2 * tensor, "copy", "bytes of scores read, probs written")


BENCHMARK = Benchmark(
    op="stable_softmax",
    cases=cases,
    inputs=make_inputs,
    truths={"op": truth},
    backends=("triton", "cuda", "cpu"),
    call=lambda op, x: op(x.scores, alpha=ALPHA, causal=x.causal),
    rivals=softmax.VARIANTS,
    work=work,
    baseline="eager PB-relax",
    part=part,
)
