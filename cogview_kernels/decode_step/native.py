# SPDX-License-Identifier: Apache-2.0
"""All layers of a decoding step through the compiled extension, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cogview_kernels import _checks, _extension
from cogview_kernels._attention import causal_layout, native_layout
from cogview_kernels._norms import rows as shared
from cogview_kernels._norms.rows import NormOptions
from cogview_kernels.layout import ThreeRegionLayout

LARGEST_HEAD = 256
# More were not measured: what the layers do one by one is then nearly all of their time.
MOST_ROWS = 256


def limit(backend: str, rows: int, head_size: int, tensors: Sequence[Tensor]) -> str:
    """Why the kernel cannot take so many rows through a stack of these; empty when it can."""
    instead = "use backend='reference'"
    if reason := _checks.kernel_dtype_limit(backend, "stack", tensors[0]):
        return f"{reason}; {instead}"
    if rows > MOST_ROWS:
        return f"the {backend} backend takes x of at most {MOST_ROWS} rows in all, got {rows}; {instead}"
    if head_size > LARGEST_HEAD:
        return f"the {backend} backend takes head sizes up to {LARGEST_HEAD}, got {head_size}; {instead}"
    unfit = [x for x in tensors if type(x) not in _checks.PLAIN or not x.is_contiguous()]
    if unfit:
        return (
            f"the {backend} backend takes plain and contiguous tensors in stack, got a "
            f"{type(unfit[0]).__name__} of strides {unfit[0].stride()}; {instead}"
        )
    return ""


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
    """Fills ``out`` and the places of the new tokens in ``cache``. Rows of ``head`` are contiguous, and
    everything else throughout."""
    _extension.call(
        "decode_step",
        backend,
        x,
        out,
        head,
        tensors,
        cache,
        lengths,
        causal_layout(cache.shape[4], None) if layout is None else native_layout(layout, layout.pivots, None),
        shared.options(norms),
    )
