# SPDX-License-Identifier: Apache-2.0
"""The linear layer in plain PyTorch, in the dtype it is given: the judge, and the way of many rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def decode_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """See :func:`cogview_kernels.decode_linear`."""
    y = F.linear(x, weight, bias)
    return y if activation is None else F.gelu(y, approximate="tanh")
