# SPDX-License-Identifier: Apache-2.0
"""LayerNorm with PB-Relax in eager PyTorch: any device, any floating dtype, differentiable by itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cogview_kernels._norms.relax import relax


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    pb_relax: str | None = "row",
) -> Tensor:
    """See :func:`cogview_kernels.layer_norm`; computed in the dtype of ``x``."""
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(relax(x, pb_relax), x.shape[-1:], weight, bias, eps)
