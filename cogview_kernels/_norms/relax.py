# SPDX-License-Identifier: Apache-2.0
"""PB-Relax in plain PyTorch, shared by the references of the norms."""

from __future__ import annotations

import torch
from torch import Tensor


def relax(x: Tensor, pb_relax: str | None) -> Tensor:
    """``x / (abs_max / 8)``, with the absolute maximum of a row or of the tensor as a constant (no gradient).

    LayerNorm of the result is LayerNorm of ``x`` with ``eps * (abs_max / 8)^2`` in place of ``eps``.
    A row (tensor) of zeros stays one, and passes no gradient.
    """
    if pb_relax is None or x.numel() == 0:
        return x
    size = x.detach().abs()
    abs_max = size.amax(-1, keepdim=True) if pb_relax == "row" else size.amax()
    # Divided first, since an eighth of a subnormal maximum is zero.
    return x / torch.where(abs_max == 0, torch.inf, abs_max) * 8
