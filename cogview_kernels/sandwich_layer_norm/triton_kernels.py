# SPDX-License-Identifier: Apache-2.0
"""Sandwich-LayerNorm on NVIDIA GPUs, by the kernels that it shares with Sandwich-RMSNorm."""

from __future__ import annotations

from torch import Tensor

from cogview_kernels._dropout import Dropout
from cogview_kernels._norms import sandwich_triton
from cogview_kernels._norms.rows import BackwardRows, ForwardRows, NormOptions, Norms
from cogview_kernels._norms.sandwich_triton import limit

__all__ = ["backward", "forward", "limit"]


def forward(
    rows: ForwardRows, norms: Norms, stats: Tensor, options: NormOptions, dropout: Dropout | None, _: str
) -> None:
    """Fills ``residual_out``, ``normed`` and ``stats`` [4, rows]; everything is contiguous."""
    sandwich_triton.forward(rows, norms, stats, options, dropout, rms=False)


def backward(
    rows: BackwardRows, norms: Norms, gradients: Norms, stats: Tensor, dropout: Dropout | None, _: str
) -> None:
    """Fills ``dbranch``, ``dresidual`` and what there is of ``gradients``; everything is contiguous."""
    sandwich_triton.backward(rows, norms, gradients, stats, dropout, rms=False)
