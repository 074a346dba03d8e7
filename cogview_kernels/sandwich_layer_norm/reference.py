# SPDX-License-Identifier: Apache-2.0
"""Sandwich-LayerNorm in eager PyTorch: any device, any floating dtype, differentiable by itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cogview_kernels import _dropout
from cogview_kernels._dropout import Dropout
from cogview_kernels._norms.dropout import drop_rows
from cogview_kernels._norms.relax import relax


def sandwich_layer_norm_reference(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    pb_relax: str | None = "row",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`cogview_kernels.sandwich_layer_norm`; computed in the dtype of ``branch``."""

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        weight = None if weight is None else weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return F.layer_norm(relax(x, pb_relax), x.shape[-1:], weight, bias, eps)

    dropout = Dropout.of(dropout_p, _dropout.as_seed(dropout_p, seed, branch.device))
    residual_out = residual + norm(drop_rows(branch, dropout), post_weight, post_bias)
    return residual_out, norm(residual_out, pre_weight, pre_bias)
