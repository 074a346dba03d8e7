# SPDX-License-Identifier: Apache-2.0
"""The cpu backend: the steps of ``pieces`` by the compiled extension (csrc/linear_cross_entropy)."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _extension
from cogview_kernels.linear_cross_entropy import chunked


def reduce(logits: Tensor, target: Tensor, stats: Tensor) -> None:
    """See :class:`pieces.Steps`."""
    logit_max, total, picked = stats
    picked.copy_(chunked.picked_logits(logits, target))
    _extension.native.linear_cross_entropy_reduce_cpu(
        _described(logits), logit_max.data_ptr(), total.data_ptr(), torch.get_num_threads()
    )


def gradient(logits: Tensor, first: int, target: Tensor, coefficient: Tensor, stats: Tensor) -> None:
    """See :class:`pieces.Steps`."""
    _extension.native.linear_cross_entropy_gradient_cpu(
        _described(logits),
        first,
        target.data_ptr(),
        coefficient.data_ptr(),
        stats[0].data_ptr(),
        stats[1].data_ptr(),
        torch.get_num_threads(),
    )


scale = chunked.scale


def _described(logits: Tensor) -> tuple[int, int, int, int, int]:
    """Address, stride of a row, ids, tokens, dtype."""
    return logits.data_ptr(), logits.stride(0), *logits.shape, _extension.DTYPE_CODES[logits.dtype]
