# SPDX-License-Identifier: Apache-2.0
"""RMSNorm in eager PyTorch: any device, any floating dtype, differentiable by itself."""

from __future__ import annotations

from torch import Tensor

from cogview_kernels._norms.rms import normalise_by_rms


def rms_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    pb_relax: str | None = None,
) -> Tensor:
    """See :func:`cogview_kernels.rms_norm`."""
    return normalise_by_rms(
        x,
        weight,
        eps=eps,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        pb_relax=pb_relax,
    )
