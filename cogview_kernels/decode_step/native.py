# SPDX-License-Identifier: Apache-2.0
"""All layers of a decoding step through the compiled extension, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cogview_kernels import _checks, _extension
from cogview_kernels._attention import causal_layout, native_layout, with_rows
from cogview_kernels._norms import rows as shared
from cogview_kernels._norms.rows import NormOptions
from cogview_kernels.layout import ThreeRegionLayout

LARGEST_HEAD = 256
# Up to here a step was timed: 1.2 to 2.8 times as fast as the model's modules on a Zen 4 (512 rows of a small
# model: 1.4 to 1.6).
MOST_ROWS = 256
# Of bfloat16 on a processor with tiles, by which PyTorch multiplies more.
MOST_ROWS_BESIDE_TILES = 64


def limit(backend: str, rows: int, head_size: int, tensors: Sequence[Tensor]) -> str:
    """Why the kernel cannot take so many rows through a stack of these; empty when it can."""
    instead = "use backend='reference'"
    if reason := _checks.kernel_dtype_limit(backend, "stack", tensors[0]):
        return f"{reason}; {instead}"
    most = MOST_ROWS_BESIDE_TILES if _has_tiles(tensors[0]) else MOST_ROWS
    if rows > most:
        return f"the {backend} backend takes x of at most {most} rows in all, got {rows}; {instead}"
    if head_size > LARGEST_HEAD:
        return f"the {backend} backend takes head sizes up to {LARGEST_HEAD}, got {head_size}; {instead}"
    unfit = [x for x in tensors if type(x) not in _checks.PLAIN or not x.is_contiguous()]
    if unfit:
        return (
            f"the {backend} backend takes plain and contiguous tensors in stack, got a "
            f"{type(unfit[0]).__name__} of strides {unfit[0].stride()}; {instead}"
        )
    return ""


def handle(tensors: Sequence[Tensor]) -> Any:
    """A stack's tensors as the extension reads them."""
    return _extension.native.DecodeStack(list(tensors))


def _has_tiles(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and _extension.native.isa() == "amx"


def prepare(
    x: Tensor,
    stack: Any,
    head: Tensor | None,
    cache: Tensor,
    lengths: Tensor,
    layout: ThreeRegionLayout | None,
) -> Callable[..., Tensor] | None:
    """See :class:`cogview_kernels._torch_ops.Op`: a function of the same; ``stack`` is a ``LayerStack``."""
    lists = (x, lengths, None if layout is None else layout.pivots)
    if not all(tensor is None or tensor.is_contiguous() for tensor in lists):
        return None
    if head is not None and with_rows(head) is not head:
        return None
    native, threads, empty_like = _extension.native, torch.get_num_threads, torch.empty_like
    S = cache.shape[4]
    all_keys, options = causal_layout(S, None), shared.options(NormOptions(stack.eps, stack.pb_relax))
    logits = None if head is None else (*x.shape[:2], head.shape[0])

    def run(x, stack, head, cache, lengths, layout):
        out = empty_like(x) if logits is None else x.new_empty(logits)
        regions = all_keys if layout is None else native_layout(layout, layout.pivots, None)
        native.decode_step_cpu(x, out, head, stack.handle, cache, lengths, regions, options, threads())
        increment_version(cache)
        return out

    return run


def forward(
    x: Tensor,
    tensors: Sequence[Tensor],
    head: Tensor | None,
    cache: Tensor,
    lengths: Tensor,
    layout: ThreeRegionLayout | None,
    norms: NormOptions,
    out: Tensor,
    backend: str,
) -> None:
    """Fills ``out`` and the places of the new tokens in ``cache``, which autograd is told.

    Rows of ``head`` are contiguous, and everything else throughout.
    """
    _extension.call(
        "decode_step",
        backend,
        x,
        out,
        head,
        handle(tensors),
        cache,
        lengths,
        causal_layout(cache.shape[4], None) if layout is None else native_layout(layout, layout.pivots, None),
        shared.options(norms),
    )
    increment_version(cache)
