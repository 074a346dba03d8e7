# SPDX-License-Identifier: Apache-2.0
"""The cpu backend: the steps of ``pieces`` by the compiled extension (csrc/linear_cross_entropy)."""

from __future__ import annotations

from torch import Tensor

from cogview_kernels import _checks, _extension
from cogview_kernels.linear_cross_entropy import chunked


def limit(backend: str, hidden: Tensor) -> str:
    """Why the steps cannot take ``hidden``; empty when they can."""
    return _checks.kernel_dtype_limit(backend, "hidden", hidden)


def reduce(logits: Tensor, target: Tensor, stats: Tensor) -> None:
    """See :class:`pieces.Steps`."""
    logit_max, total, picked = stats
    picked.copy_(chunked.picked_logits(logits, target))
    _extension.call(
        "linear_cross_entropy_reduce", "cpu", _described(logits), logit_max.data_ptr(), total.data_ptr()
    )


def gradient(logits: Tensor, first: int, target: Tensor, coefficient: Tensor, stats: Tensor) -> None:
    """See :class:`pieces.Steps`."""
    _extension.call(
        "linear_cross_entropy_gradient",
        "cpu",
        _described(logits),
        first,
        target.data_ptr(),
        coefficient.data_ptr(),
        stats[0].data_ptr(),
        stats[1].data_ptr(),
    )


scale = chunked.scale


def _described(logits: Tensor) -> tuple[int, int, int, int, int]:
    """Address, stride of a row, ids, tokens, dtype."""
    return logits.data_ptr(), logits.stride(0), *logits.shape, _extension.DTYPE_CODES[logits.dtype]
