# SPDX-License-Identifier: Apache-2.0
"""What attention ops hand to compiled code: tensors ``[B, heads, positions, D]`` and the layout."""

from __future__ import annotations

from torch import Tensor
from torch import contiguous_format as _contiguous

from cogview_kernels.layout import ThreeRegionLayout

# ``_C.pyi`` tells what the members are.
NativeLayout = tuple[Tensor | None, int, int, float, bool, Tensor | None]

_LARGEST = 2**30


def with_rows(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous: kernels take any other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_in_order_of(x: Tensor) -> Tensor:
    """Uninitialised and dense, heads inside positions where ``x`` has them so: transposes around the op then
    stay views."""
    B, H, T, D = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(B, T, H, D).transpose(1, 2)
    return x.new_empty(B, H, T, D)


def aligned(x: Tensor) -> Tensor:
    """``x`` with every row at a multiple of eight elements and 16 bytes, which is how CUDA kernels read."""
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    for size, stride in zip(x.shape[:3], x.stride(), strict=False):
        fits = fits and (size == 1 or stride % 8 == 0)
    return x if fits else x.clone(memory_format=_contiguous)


def native_layout(layout: ThreeRegionLayout, pivots: Tensor, starts: Tensor | None) -> NativeLayout:
    """``pivots`` are those of ``layout``, contiguous as ``starts`` are; the caller keeps both alive."""
    # Compiled code cuts blocks and window down to the sequence; here they are made to fit its integers.
    window = (min(layout.block_size, _LARGEST), min(layout.window_blocks, _LARGEST))
    return pivots, *window, layout.pivot_bias, layout.causal, starts


def causal_layout(num_keys: int, starts: Tensor | None) -> NativeLayout:
    """Every key up to the query's own: one block as long as the keys, and no pivots."""
    return None, num_keys, 1, 0.0, True, starts
