# SPDX-License-Identifier: Apache-2.0
"""Sandwich-RMSNorm in eager PyTorch: any device, any floating dtype, differentiable by itself."""

from __future__ import annotations

from torch import Tensor

from cogview_kernels import _dropout
from cogview_kernels._dropout import Dropout
from cogview_kernels._norms.dropout import drop_rows
from cogview_kernels._norms.rms import normalise_by_rms


def sandwich_rms_norm_reference(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    pre_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    pb_relax: str | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`cogview_kernels.sandwich_rms_norm`. The norm is rounded before it is added, as models do."""

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        return normalise_by_rms(
            x,
            weight,
            eps=eps,
            weight_offset=weight_offset,
            round_before_weight=round_before_weight,
            pb_relax=pb_relax,
        )

    dropout = Dropout.of(dropout_p, _dropout.as_seed(dropout_p, seed, branch.device))
    residual_out = residual + norm(drop_rows(branch, dropout), post_weight)
    return residual_out, None if pre_weight is None else norm(residual_out, pre_weight)
