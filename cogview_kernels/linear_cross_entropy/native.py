# SPDX-License-Identifier: Apache-2.0
"""The cpu backend: the steps of ``pieces`` by the compiled extension (csrc/linear_cross_entropy)."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _checks, _extension
from cogview_kernels.linear_cross_entropy import chunked
from cogview_kernels.linear_cross_entropy.objective import Objective
from cogview_kernels.linear_cross_entropy.pieces import Piece, Tokens

MANY_ROWS = 1024  # of a transposed product, from which on the extension's is faster


def limit(backend: str, hidden: Tensor) -> str:
    """Why the steps cannot take ``hidden``; empty when they can."""
    return _checks.kernel_dtype_limit(backend, "hidden", hidden)


def reduce(piece: Piece, tokens: Tokens, objective: Objective) -> None:
    """See :class:`pieces.Steps`."""
    logit_max, total, picked, *sums = tokens.stats
    _extension.call(
        "linear_cross_entropy_reduce",
        "cpu",
        _described(piece, objective),
        tokens.target.data_ptr(),
        logit_max.data_ptr(),
        total.data_ptr(),
        picked.data_ptr(),
        sums[0].data_ptr() if sums else 0,
        _address(tokens.predicted),
    )


def gradient(piece: Piece, tokens: Tokens, objective: Objective, dbias: Tensor | None) -> None:
    """See :class:`pieces.Steps`."""
    smoothing = objective.label_smoothing
    _extension.call(
        "linear_cross_entropy_gradient",
        "cpu",
        _described(piece, objective),
        (objective.z_loss, smoothing / piece.ids, 1 - smoothing),
        tokens.target.data_ptr(),
        tokens.coefficient.data_ptr(),
        tokens.stats[0].data_ptr(),
        tokens.stats[1].data_ptr(),
        _address(dbias),
    )


def transposed_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """See :class:`pieces.Steps`. PyTorch's own, but for bfloat16 on a CPU with tiles."""
    has_rows = a.stride(1) == b.stride(1) == out.stride(1) == 1 and out.numel() > 0
    if a.dtype == torch.bfloat16 and len(a) >= MANY_ROWS and has_rows and _extension.native.isa() == "amx":
        _extension.call("linear_cross_entropy_transposed_product", "cpu", a, b, out)
    else:
        chunked.transposed_product(a, b, out)


scale = chunked.scale


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _described(piece: Piece, objective: Objective) -> tuple[int, int, int, int, int, int, float, int]:
    """Address, stride of a row, ids, tokens, the first id, bias, softcap, dtype."""
    logits = piece.logits
    return (
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        piece.first,
        _address(piece.bias),
        objective.softcap,
        _extension.DTYPE_CODES[logits.dtype],
    )
