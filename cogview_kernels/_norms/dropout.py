# SPDX-License-Identifier: Apache-2.0
"""Dropout of rows in plain PyTorch, shared by the references of the sandwich norms."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _dropout
from cogview_kernels._dropout import Dropout


def drop_rows(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Row r of ``x`` taken as ``[rows, C]`` draws from the counter (r mod 2^32, r div 2^32, 0)."""
    if dropout is None:
        return x
    C = x.shape[-1]
    rows = torch.arange(x.numel() // C, device=x.device)
    words = dropout.words(rows & 0xFFFFFFFF, rows >> 32, torch.zeros_like(rows))
    columns = torch.arange(C, device=x.device)
    keep = _dropout.keep_mask(dropout, (words[0][:, None], words[1][:, None]), columns)
    return torch.where(keep.view(x.shape), x / (1 - dropout.p), 0)
