# SPDX-License-Identifier: Apache-2.0
"""LayerNorm on NVIDIA GPUs, by the kernels that it shares with RMSNorm."""

from __future__ import annotations

from torch import Tensor

from cogview_kernels._norms import single_triton
from cogview_kernels._norms.rows import Affine, NormOptions
from cogview_kernels._norms.single_triton import limit

__all__ = ["backward", "forward", "limit"]


def forward(x: Tensor, y: Tensor, affine: Affine, stats: Tensor, options: NormOptions, _: str) -> None:
    """Fills ``y`` and ``stats`` [2, rows]; everything is contiguous."""
    single_triton.forward(x, y, affine, stats, options, rms=False)


def backward(
    dy: Tensor, x: Tensor, dx: Tensor, weight: Tensor | None, gradients: Affine, stats: Tensor, _: str
) -> None:
    """Fills ``dx`` and what there is of ``gradients``; everything is contiguous."""
    single_triton.backward(dy, x, dx, weight, gradients, stats, rms=False)
