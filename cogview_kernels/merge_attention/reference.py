# SPDX-License-Identifier: Apache-2.0
"""The joint softmax of several attentions in eager PyTorch: any device, any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention_reference(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See :func:`cogview_kernels.merge_attention`; ``(out, lse)`` in the dtypes that they come in."""
    stacked = torch.stack(tuple(lses))
    finite = torch.finfo(stacked.dtype)
    top = stacked.detach().amax(0).clamp(min=finite.min)
    exponentials = (stacked - top).exp()
    total = exponentials.sum(0)
    # A query that saw no key has a total of 0; its gradients would be NaN.
    positive = total.clamp(min=finite.tiny)
    weights = (exponentials / positive).to(outputs[0].dtype)
    lse = torch.where(total > 0, top + positive.log(), -torch.inf)
    return (weights[..., None] * torch.stack(tuple(outputs))).sum(0), lse
