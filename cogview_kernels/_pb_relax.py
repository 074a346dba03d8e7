# SPDX-License-Identifier: Apache-2.0
"""PB-Relax for LayerNorm in eager PyTorch, shared by the references of the two norms."""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("row", "tensor", None)


def pb_relax(x: Tensor, mode: str | None) -> Tensor:
    """``x / (max|x| / 8)``, the maximum taken per row or over the whole tensor as a constant (no gradient).

    LayerNorm of the result is LayerNorm of ``x`` with ``eps * (max|x| / 8)^2`` in place of ``eps``.
    A row (tensor) of zeros stays one, and passes no gradient.
    """
    if mode is None or x.numel() == 0:
        return x
    size = x.detach().abs()
    peak = size.amax(-1, keepdim=True) if mode == "row" else size.amax()
    # Divided first: max / 8 of a subnormal maximum is zero.
    return x / torch.where(peak == 0, torch.inf, peak) * 8
