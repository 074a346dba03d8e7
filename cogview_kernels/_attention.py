# SPDX-License-Identifier: Apache-2.0
"""What attention ops share: how compiled code is handed tensors ``[B, heads, positions, D]`` and the layout,
and what a layout must be where keys are cached."""

from __future__ import annotations

from torch import Tensor
from torch import contiguous_format as _contiguous

from cogview_kernels import _checks, _torch_ops
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
    return pivots, *window, layout.kernel_bias, layout.causal, starts


def causal_layout(num_keys: int, starts: Tensor | None) -> NativeLayout:
    """Every key up to the query's own: one block as long as the keys, and no pivots."""
    return None, num_keys, 1, 0.0, True, starts


def check_head(op: str, name: str, x: Tensor, q: Tensor, shape: str = "[B, H, T, D]") -> None:
    """``x`` has four dimensions, which ``shape`` names, and dtype and device of ``q``, which may be ``x``."""
    _checks.check_float(op, name, x)
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(x.shape)}")
    if x.dtype != q.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of q, {q.dtype}, got {x.dtype}")
    _checks.check_same_device(op, name, x, "q", q)


def check_heads(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int | None,
    names: tuple[str, str] = ("k", "v"),
    beside: str = "q",
) -> None:
    """Keys and values, called ``names``, go with ``q``, which has passed :func:`check_head`.

    They are ``[B, Hkv, length, D]``, of any length where ``length`` is None. D is at least 1, H a multiple
    of Hkv.
    """
    k_name, v_name = names
    check_head(op, k_name, k, q, "[B, Hkv, S, D]")
    check_head(op, v_name, v, q, "[B, Hkv, S, D]")
    B, H, _, D = q.shape
    if D == 0:
        raise ValueError(f"{op}: q must have a head size of at least 1, got shape {tuple(q.shape)}")
    keys = k.shape
    if keys[0] != B or keys[3] != D or not (length is None or keys[2] == length):
        S = "S" if length is None else length
        raise ValueError(
            f"{op}: {k_name} must have shape [{B}, Hkv, {S}, {D}] to go with {beside}, got {tuple(keys)}"
        )
    if v.shape != keys:
        raise ValueError(
            f"{op}: {v_name} must have the shape of {k_name}, {tuple(keys)}, got {tuple(v.shape)}"
        )
    if keys[1] == 0 or H % keys[1]:
        raise ValueError(f"{op}: q's heads must be a multiple of {k_name}'s, got {H} and {keys[1]}")


def check_lengths(op: str, lengths: Tensor, most: int, meaning: str) -> None:
    """Where they can be read: ``lengths`` of a cache lie in [0, ``most``], which is ``meaning``."""
    if _torch_ops.values_are_readable(lengths) and any(not 0 <= n <= most for n in lengths.tolist()):
        raise ValueError(f"{op}: lengths must lie in [0, {most}] ({meaning}), got {lengths.tolist()}")


def check_layout(
    op: str, layout: ThreeRegionLayout | None, other_name: str, other: Tensor, *, causal: bool = False
) -> None:
    """``layout`` is None, or for the batch and device of ``other``, ``[B, ...]``; ``causal``: it must be."""
    if layout is None:
        return
    if not isinstance(layout, ThreeRegionLayout):
        raise TypeError(f"{op}: layout must be a ThreeRegionLayout or None, got {type(layout).__name__}")
    if causal:
        layout.check_causal(op)
    pivots, B = layout.pivots, other.shape[0]
    if pivots.shape[0] != B:
        raise ValueError(
            f"{op}: layout.pivots must have shape [{B}, P] to go with {other_name}, got {tuple(pivots.shape)}"
        )
    _checks.check_same_device(op, "layout.pivots", pivots, other_name, other)


def check_pivots_of_cache(op: str, layout: ThreeRegionLayout | None, size: int) -> None:
    """Where they can be read. Decoding is short, so the whole check of a layout's pivots would be felt."""
    if layout is None or not _torch_ops.values_are_readable(layout.pivots):
        return
    if layout.pivots.numel() == 0:
        return
    least, most = (int(x) for x in layout.pivots.aminmax())
    if least < -1 or most >= size:
        raise ValueError(
            f"{op}: layout.pivots must lie in [0, {size}), the cache's size (-1 pads), "
            f"got {most if most >= size else least}"
        )
