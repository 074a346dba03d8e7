# SPDX-License-Identifier: Apache-2.0
"""Whether the Triton attention is right on this device: finite, the same bits twice, within its budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness
from cogview_kernels import ThreeRegionLayout, three_region_attention


@dataclass(frozen=True)
class Sizes:
    T: int = 700
    P: int = 200
    block_size: int = 64


@dataclass(frozen=True)
class Check:
    """``largest``: of |q| and |k|, None for what a normal distribution gives. ``allowed``: error of the
    output, relative in norm; gradients get three times as much."""

    name: str
    dtype: torch.dtype
    allowed: float
    D: int = 64
    dropout_p: float = 0.0
    largest: float | None = None

    def run(self, device: torch.device, sizes: Sizes) -> tuple[bool, str]:
        """Whether attention with its backward passes, and what was found."""
        generator = torch.Generator().manual_seed(1)
        T = sizes.T
        q, k, v, dout = (torch.randn(2, 2, T, self.D, generator=generator) for _ in range(4))
        if self.largest is not None:
            q, k = (x / x.abs().max() * self.largest for x in (q, k))
        q, k, v, dout = (x.to(self.dtype).to(device) for x in (q, k, v, dout))
        pivots = torch.stack([torch.randperm(T, generator=generator)[: sizes.P] for _ in range(2)])
        layout = ThreeRegionLayout(pivots.to(device), sizes.block_size, 3, 0.7)

        def results(backend: str, *tensors: Tensor) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in tensors]
            options = {"dropout_p": self.dropout_p, "seed": 5, "backend": backend}
            out = three_region_attention(*leaves, layout, **options)
            return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

        ours, again = results("triton", q, k, v), results("triton", q, k, v)
        truth = results("reference", q.double(), k.double(), v.double())
        same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        finite = all(bool(x.isfinite().all()) for x in ours)
        errors = [harness.relative_error((a,), (t,)) for a, t in zip(ours, truth, strict=True)]
        # Where one key takes everything, dq and dk are rounding alone: out and dv can be judged.
        judged = errors[1:] if self.largest is None else errors[3:]
        good = same and finite and errors[0] <= self.allowed and max(judged) <= 3 * self.allowed
        found = " ".join(f"{x} {e:.1e}" for x, e in zip(("out", "dq", "dk", "dv"), errors, strict=True))
        return good, f"same bits {same}, finite {finite}, {found}"


CHECKS = (
    Check("bf16", torch.bfloat16, 2e-2),
    Check("bf16, D=128", torch.bfloat16, 2e-2, D=128),
    Check("bf16, dropout", torch.bfloat16, 2e-2, dropout_p=0.1),
    Check("fp16", torch.float16, 4e-3),
    Check("fp16, q and k up to 2,000", torch.float16, 4e-3, largest=2e3),
    Check("fp16, q and k up to 65,504", torch.float16, 4e-3, largest=65504.0),
    # One float32 lse is saved for bfloat16, so dv is rough there: only that all is finite can be asked.
    Check("bf16, q and k up to 65,280", torch.bfloat16, float("inf"), largest=65280.0),
    Check("fp32", torch.float32, 1e-4),
)


def chosen(tiny: bool) -> tuple[tuple[Check, ...], Sizes]:
    """The checks and their sizes. Tiny ones only show that a check runs: Triton's interpreter takes minutes
    for T=700, and it rounds fused products twice, so checks of large values hold on a GPU alone."""
    return (CHECKS[:1], Sizes(T=40, P=12, block_size=8)) if tiny else (CHECKS, Sizes())
