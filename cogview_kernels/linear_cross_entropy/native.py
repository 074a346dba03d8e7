# SPDX-License-Identifier: Apache-2.0
"""The cpu backend: the steps of ``pieces`` by the compiled extension (csrc/linear_cross_entropy)."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _checks, _extension
from cogview_kernels.linear_cross_entropy import chunked, pieces
from cogview_kernels.linear_cross_entropy.objective import Objective
from cogview_kernels.linear_cross_entropy.pieces import AddToSum, Piece, Tokens

# From which on the extension's products are faster than PyTorch's: rows of a transposed one with tiles, and
# multiplications of one without.
MANY_ROWS = 1024
MANY_PRODUCTS = 2**22


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


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, alpha: float = 1.0) -> None:
    """See :class:`pieces.Steps`. PyTorch's own, but where the extension's is faster."""
    if alpha == 1.0 and _is_faster(a, b, out):
        _extension.call("linear_cross_entropy_product", "cpu", a, b, out, add, 0, False)
    else:
        pieces.product(a, b, out, add=add, alpha=alpha)


def adder(out: Tensor) -> AddToSum | None:
    """See :class:`pieces.Steps`. Of bfloat16, where its products are the extension's."""
    return _add_to_sum if out.dtype == torch.bfloat16 and _multiplies(out.dtype) else None


def _add_to_sum(a: Tensor, b: Tensor, high: Tensor, low: Tensor, *, first: bool, last: bool) -> None:
    _extension.call("linear_cross_entropy_product", "cpu", a, b, high, not first, low.data_ptr(), last)


scale = chunked.scale


def _is_faster(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether the extension's product is faster: of bfloat16 with tiles one over many rows, and on AMD's
    processors every large one."""
    rows, columns = a.stride(1) == 1, a.stride(0) == 1
    if out.stride(1) != 1 or not (rows or columns) or not (b.stride(1) == 1 or (rows and b.stride(0) == 1)):
        return False
    if _extension.native.isa() == "amx":
        return a.dtype == torch.bfloat16 and columns and a.shape[1] >= MANY_ROWS
    return _multiplies(a.dtype) and out.numel() * a.shape[1] >= MANY_PRODUCTS


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether large products of rows are the extension's."""
    isa = _extension.native.isa()
    has = isa == "avx512bf16" if dtype == torch.bfloat16 else isa.startswith("avx") and dtype == torch.float32
    return has and _extension.native.is_amd()


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
