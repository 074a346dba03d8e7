# SPDX-License-Identifier: Apache-2.0
"""Three-region attention through the compiled extension, on the CPU and on NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _checks, _extension
from cogview_kernels._attention import aligned, empty_in_order_of, native_layout
from cogview_kernels._dropout import Dropout, native_arguments
from cogview_kernels.layout import ThreeRegionLayout

LARGEST_HEAD = 256
CUDA_HEADS = (32, 64, 80, 96, 128)


def limit(backend: str, q: Tensor) -> str:
    """Why the kernels cannot take ``q``, and the way out; empty when they can."""
    if q.dtype not in _checks.FLOATS:
        return f"{_checks.kernel_dtype_limit(backend, 'q', q)}; use backend='sdpa'"
    _, _, T, D = q.shape
    if T >= 2**30:
        return f"the {backend} backend takes T below 2^30, got {T}; use backend='sdpa'"
    if backend == "cuda":
        if q.dtype != torch.float16:
            return (
                f"the cuda backend computes in float16, got {q.dtype}; convert, use autocast, "
                "or use backend='sdpa'"
            )
        if D not in CUDA_HEADS:
            heads = ", ".join(map(str, CUDA_HEADS))
            return f"the cuda backend takes head sizes {heads}, got {D}; use backend='sdpa'"
    if D > LARGEST_HEAD:
        return f"the {backend} backend takes head sizes up to {LARGEST_HEAD}, got {D}; use backend='sdpa'"
    return ""


def _sorted_pivots(q: Tensor, layout: ThreeRegionLayout) -> Tensor:
    """Where the CUDA kernels sort the pivots that some query sees as far keys. The CPU has its own place."""
    reaches_all = layout.block_size * layout.window_blocks >= q.shape[2]
    P = 0 if reaches_all else layout.pivots.shape[1]
    return layout.pivots.new_empty(q.shape[0], P, dtype=torch.int32)


def _shared(q, k, layout, pivots, starts, scale, dropout, sorted_pivots):
    """What both directions take, from the shape on."""
    B, H, T, D = q.shape
    return (
        (B, H, k.shape[1], T, D),
        native_layout(layout, pivots, starts),
        scale,
        native_arguments(dropout),
        _extension.DTYPE_CODES[q.dtype],
        0 if sorted_pivots is None else sorted_pivots.data_ptr(),
    )


def both_or_neither(
    k: Tensor, v: Tensor, dk: Tensor | None, dv: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Room for a gradient that is not wanted, where kernels make both of k and v at once."""
    if dk is None and dv is None:
        return None, None
    return empty_in_order_of(k) if dk is None else dk, empty_in_order_of(v) if dv is None else dv


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    starts: Tensor | None,
    scale: float,
    dropout: Dropout | None,
    results: tuple[Tensor, Tensor, Tensor],
    backend: str,
) -> None:
    """Fills ``results``, out and lse; there are no residuals. Rows are contiguous, ``starts`` throughout."""
    out, lse, _ = results
    if backend == "cuda":
        q, k, v = aligned(q), aligned(k), aligned(v)
    pivots = layout.pivots.contiguous()
    sorted_pivots = None if backend == "cpu" else _sorted_pivots(q, layout)
    _extension.call(
        "three_region_attention_fwd",
        backend,
        q,
        k,
        v,
        out,
        lse.data_ptr(),
        *_shared(q, k, layout, pivots, starts, scale, dropout, sorted_pivots),
    )


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    starts: Tensor | None,
    scale: float,
    dropout: Dropout | None,
    saved: tuple[Tensor, Tensor, Tensor],
    doutputs: tuple[Tensor, Tensor | None],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    backend: str,
) -> None:
    """Fills ``gradients``, of q, k and v; None is not wanted. ``saved`` and ``doutputs``: of out and lse.
    Rows are contiguous, ``starts`` throughout."""
    (out, lse, _), (dout, dlse) = saved, doutputs
    if backend == "cuda":
        gradients = gradients[0], *both_or_neither(k, v, *gradients[1:])
        q, k, v, out, dout = map(aligned, (q, k, v, out, dout))
    pivots = layout.pivots.contiguous()
    sorted_pivots = None if backend == "cpu" else _sorted_pivots(q, layout)
    if sorted_pivots is not None:
        delta = torch.empty_like(lse)
        far = lse.new_empty(2, *k.shape[:2], sorted_pivots.shape[1], k.shape[3])
        workspace = (delta.data_ptr(), far[0].data_ptr(), far[1].data_ptr())
    else:
        workspace = (0, 0, 0)
    _extension.call(
        "three_region_attention_bwd",
        backend,
        (q, k, v, out, dout),
        lse.data_ptr(),
        0 if dlse is None else dlse.data_ptr(),
        gradients,
        *_shared(q, k, layout, pivots, starts, scale, dropout, sorted_pivots),
        workspace,
    )
