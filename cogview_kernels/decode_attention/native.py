# SPDX-License-Identifier: Apache-2.0
"""Decode attention through the compiled extension, on the CPU and on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import contiguous_format as _contiguous

from cogview_kernels import _checks, _counters, _extension
from cogview_kernels._attention import NativeLayout, aligned, causal_layout, native_layout, with_rows
from cogview_kernels.layout import ThreeRegionLayout

LARGEST_HEAD = 256

# CUDA: keys of a thread block, and blocks that may share a query's keys. Both follow from shapes alone.
_CHUNK, _MOST_SPLITS = 256, 64
_UNDIVIDED = (0, 0, 0, 0)  # the CPU divides the keys by itself: the lengths are at hand


def limit(backend: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str:
    """Why a kernel cannot take these, and the way out; empty when it can."""
    if reason := _checks.kernel_dtype_limit(backend, "q", q):
        return f"{reason}; use backend='sdpa'"
    D = q.shape[3]
    if D > LARGEST_HEAD or (backend == "cuda" and D % 8):
        sizes = f"multiples of 8 up to {LARGEST_HEAD}" if backend == "cuda" else f"up to {LARGEST_HEAD}"
        return f"the {backend} backend takes head sizes {sizes}, got {D}; use backend='sdpa'"
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
        return (
            f"the {backend} backend has no gradient; use backend='sdpa', or torch.no_grad() where none is "
            "needed"
        )
    return ""


def prepare(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    layout: ThreeRegionLayout | None,
    starts: Tensor | None,
    scale: float,
) -> Callable[..., Tensor] | None:
    """See :class:`cogview_kernels._torch_ops.Op`: a function of the first six."""
    lists = (lengths, starts, None if layout is None else layout.pivots)
    if not all(with_rows(x) is x for x in (q, k_cache, v_cache)):
        return None
    if not all(x is None or x.is_contiguous() for x in lists):
        return None
    kernel, threads = _extension.native.decode_attention_cpu, torch.get_num_threads
    empty_like = torch.empty_like
    dense: dict[str, Any] = {} if q.is_contiguous() else {"memory_format": _contiguous}
    S = k_cache.shape[2]
    all_keys = causal_layout(S, None)

    def run(q, k_cache, v_cache, lengths, layout, starts):
        out = empty_like(q, **dense)
        regions = all_keys if layout is None and starts is None else _regions(S, layout, starts)
        kernel(q, k_cache, v_cache, lengths, out, regions, scale, _UNDIVIDED, threads())
        return out

    return run


def _regions(S: int, layout: ThreeRegionLayout | None, starts: Tensor | None) -> NativeLayout:
    return causal_layout(S, starts) if layout is None else native_layout(layout, layout.pivots, starts)


def _most_keys(Tq: int, S: int, layout: ThreeRegionLayout | None) -> int:
    """How many keys, pivots included, a query may have to look at."""
    if layout is None:
        return S
    block_size, window_blocks = layout.window(S)
    return layout.pivots.shape[1] + min(S, block_size * window_blocks + Tq)


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    layout: ThreeRegionLayout | None,
    starts: Tensor | None,
    scale: float,
    out: Tensor,
    backend: str,
) -> None:
    """Fills ``out``. Rows of q and the caches are contiguous; ``lengths``, ``starts``, pivots and ``out`` are
    throughout."""
    S = k_cache.shape[2]
    splits = _UNDIVIDED
    if backend == "cuda":
        B, H, Tq, D = q.shape
        q, k_cache, v_cache = aligned(q), aligned(k_cache), aligned(v_cache)
        keys = _most_keys(Tq, S, layout)
        parts = min(_MOST_SPLITS, -(-keys // _CHUNK))
        partial = q.new_empty(B, H, Tq, parts if parts > 1 else 0, D + 2, dtype=torch.float32)
        counters = _counters.zeroed(B * H * Tq, q.device).data_ptr() if parts > 1 else 0
        splits = (-(-keys // parts), parts, partial.data_ptr(), counters)
    _extension.call(
        "decode_attention",
        backend,
        q,
        k_cache,
        v_cache,
        lengths,
        out,
        _regions(S, layout, starts),
        scale,
        splits,
    )
