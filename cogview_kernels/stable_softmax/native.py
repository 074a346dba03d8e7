# SPDX-License-Identifier: Apache-2.0
"""Stable softmax through the compiled extension, on the CPU and on NVIDIA GPUs."""

from __future__ import annotations

from torch import Tensor

from cogview_kernels import _checks, _extension


def limit(backend: str, scores: Tensor) -> str:
    """Why the kernels cannot take ``scores``; empty when they can."""
    return _checks.kernel_dtype_limit(backend, "scores", scores)


def four(values: tuple[int, ...], missing: int) -> tuple[int, ...]:
    """Kernels know ``[A, B, T, N]``: fewer leading dimensions are filled up."""
    return (missing,) * (4 - len(values)) + values


def fold(x: Tensor) -> Tensor:
    """More leading dimensions than kernels know are folded into the first."""
    return x.flatten(0, x.dim() - 4) if x.dim() > 4 else x


def forward(
    scores: Tensor, mask: Tensor | None, probs: Tensor, alpha: float, scale: float, causal: bool, backend: str
) -> None:
    """Fills ``probs``, which is contiguous; the last dimension of ``scores`` has stride 1."""
    mask = None if mask is None else fold(mask.expand(scores.shape))
    scores = fold(scores)
    # Shapes and strides as plain numbers: making a view of a tensor costs more than all of this.
    _extension.call(
        "stable_softmax_fwd",
        backend,
        scores.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        probs.data_ptr(),
        four(tuple(scores.shape), 1),
        four(scores.stride(), 0),
        (0, 0, 0, 0) if mask is None else four(mask.stride(), 0),
        alpha,
        scale,
        causal,
        _extension.DTYPE_CODES[scores.dtype],
    )


def backward(dprobs: Tensor, probs: Tensor, dscores: Tensor, factor: float, backend: str) -> None:
    """Fills ``dscores``; all three are contiguous and of one shape."""
    N = probs.shape[-1]
    _extension.call(
        "stable_softmax_bwd",
        backend,
        dprobs.data_ptr(),
        probs.data_ptr(),
        dscores.data_ptr(),
        probs.numel() // N,
        N,
        factor,
        _extension.DTYPE_CODES[probs.dtype],
    )
