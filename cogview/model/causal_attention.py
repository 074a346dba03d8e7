# SPDX-License-Identifier: Apache-2.0
"""Dense causal attention: on a CPU by our kernel, the faster one where both were timed, else by PyTorch's."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from cogview_kernels import three_region_attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """``F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)`` of ``[B, H, T, D]``.

    On a CPU, dropout has a mask of its own for the same seed.
    """
    if q.device.type == "cpu":
        return cast(Tensor, three_region_attention(q, k, v, None, dropout_p=dropout_p))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)
