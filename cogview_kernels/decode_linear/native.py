# SPDX-License-Identifier: Apache-2.0
"""The linear layer of few rows through the compiled extension, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _checks, _extension

# More rows are the work of a matrix product, which keeps blocks of both factors in the caches.
MOST_ROWS = 16


def limit(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Why the kernel cannot take these, and the way out; empty when it can."""
    instead = "use backend='reference'"
    if reason := _checks.kernel_dtype_limit(backend, "x", x):
        return f"{reason}; {instead}"
    if x.numel() > MOST_ROWS * x.shape[-1]:
        rows = x.numel() // x.shape[-1]
        return f"the {backend} backend takes x of at most {MOST_ROWS} rows, got {rows}; {instead}"
    if type(weight) not in _checks.PLAIN:
        return f"the {backend} backend takes a plain weight, got {type(weight).__name__}; {instead}"
    if _checks.is_autocast(x.device):
        return f"the {backend} backend does not cast, and autocast is on; {instead}"
    given = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return f"the {backend} backend has no gradient; {instead}, or torch.no_grad() where none is needed"
    return ""


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, y: Tensor, backend: str
) -> None:
    """Fills ``y``. Rows of ``weight`` are contiguous, the others throughout."""
    _extension.call("decode_linear", backend, x, weight, bias, y, activation is not None)
