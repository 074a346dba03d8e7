# SPDX-License-Identifier: Apache-2.0
"""RMSNorm in plain PyTorch, shared by the references of the RMSNorm ops."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels._norms.relax import relax


def normalise_by_rms(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    pb_relax: str | None,
) -> Tensor:
    """See :func:`cogview_kernels.rms_norm`. Rows of 16 bits are computed in float32, as all models do."""
    wide = relax(x.float() if x.dtype.itemsize == 2 else x, pb_relax)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype)
    if round_before_weight:
        y = y.to(x.dtype).to(wide.dtype)
    return (y * (weight.to(wide.dtype) + weight_offset)).to(x.dtype)
