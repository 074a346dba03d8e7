# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks, _dropout, _sharding
from cogview_kernels._attention import check_head, check_heads
from cogview_kernels.local_attention_2d import sdpa
from cogview_kernels.local_attention_2d.op import backend_module, local_attention_2d_op
from cogview_kernels.local_attention_2d.reference import local_attention_2d_reference
from cogview_kernels.local_attention_2d.window import Keys, Window

_OP = "local_attention_2d"
_BACKENDS = ("triton", "cpu", "sdpa", "reference")


def _limit(backend: str, q: Tensor, keys: Keys, window: Window, dropout_p: float, return_lse: bool) -> str:
    if backend == "reference":
        return ""
    if backend == "sdpa":
        return sdpa.limit(dropout_p, return_lse)
    return backend_module(backend).limit(backend, q, keys, window)


def local_attention_2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    kernel_size: tuple[int, int],
    *,
    query_scale: int = 1,
    causal: bool = False,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a raster of queries to windows of a raster of keys, and to extra keys, under one softmax.

    Equals, with ``(y, x)`` the place of a query and ``(row, column)`` that of a key::

        cell_y, cell_x = y // query_scale, x // query_scale
        seen = (abs(row - cell_y) <= kernel_size[0] // 2) & (abs(column - cell_x) <= kernel_size[1] // 2)
        if causal:  # raster order
            seen &= (row < cell_y) | ((row == cell_y) & (column <= cell_x))
        seen = torch.cat([seen.expand(B, -1, -1), extra_mask[:, None].expand(-1, T, -1)], 2)
        k, v = torch.cat([k, extra_k], 2), torch.cat([v, extra_v], 2)
        scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale)

    but costs what a query sees, not the grid. The window is cut at the border: nothing is seen there. Scores,
    softmax and sums are in float32 and never stored, so scores far past the fp16 limit do no harm.
    :func:`cogview_kernels.merge_attention` joins several calls under one softmax.

    Args:
        q: ``[B, H, T, D]`` in raster order, ``T = (query_scale * grid[0]) * (query_scale * grid[1])``;
            float32, float16, bfloat16 or float64 (which "sdpa" and "reference" take).
        k, v: ``[B, Hkv, grid[0] * grid[1], D]`` in raster order, dtype and device of ``q``; H is a multiple
            of Hkv, and query head h reads key head ``h // (H // Hkv)``. Any strides with the last dimension
            contiguous. Under autocast q, k, v and the extra keys may have any of these dtypes, and are cast
            as for ``scaled_dot_product_attention``.
        grid: rows and columns of the keys, at least 1 each.
        kernel_size: rows and columns of the window, odd.
        query_scale: how many times finer the grid of queries is, at least 1.
        causal: see only the keys before the query's own cell in raster order, and that cell.
        extra_k, extra_v: ``[B, Hkv, E, D]``, both or neither: keys that every query sees (text); E may be 0.
        extra_mask: boolean ``[B, E]``: which extra keys of a sample are seen; None: all.
        scale: finite, multiplies ``q @ k^T``; None is ``1 / sqrt(D)``.
        dropout_p: in [0, 1): probability with which a joint probability is dropped, the others grow by
            ``1 / (1 - dropout_p)``. Every backend draws the same mask from the same seed.
        seed: for dropout, an int of at most 64 bits or a 0-d int64 tensor, on the CPU or the device of ``q``;
            None draws one from PyTorch's CPU generator, or, while a CUDA graph is captured, from the GPU's,
            so that each replay drops others.
        return_lse: also return the log of the softmax's denominator (before dropout), differentiable.
        backend: "cpu", "triton", "sdpa" or "reference"; None takes the best for the device.

    Returns:
        ``out``, shape and dtype of ``q``; with ``return_lse`` ``(out, lse)``, ``lse`` ``[B, H, T]``
        in float32 (float64 for float64).

    Raises:
        TypeError: a dtype or type above is not met.
        ValueError: a shape or range above is not met, or devices differ.
        NotImplementedError: a limit of the backend asked for ("sdpa": no dropout, no lse; "cpu" and
            "triton": no float64, D up to 256). Without ``backend`` "sdpa" steps in, or where that cannot,
            "reference"; GPUs older than sm_80, a V100 too, have these two. Also a derivative that kernels do
            not have: of second order, or in forward mode.
            A DTensor that is cut elsewhere than along samples and heads, or dropout of one.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: CogView2, arXiv:2204.14217, section 3.2 (local attention for super-resolution).
    """
    window = _window(grid, kernel_size, query_scale, causal)
    if torch._C._is_any_autocast_enabled():
        q, k, v, extra_k, extra_v = _checks.autocast(q, k, v, extra_k, extra_v)
    _check_tensors(q, k, v, window)
    if _sharding.is_sharded(q, backend):
        options = {"scale": scale, "return_lse": return_lse, "backend": backend}
        heads = {"q": q, "k": k, "v": v, "extra_k": extra_k, "extra_v": extra_v}
        return _in_parts(heads, extra_mask, window, dropout_p, options)
    keys = _keys(k, v, extra_k, extra_v, extra_mask)
    _checks.check_dropout(_OP, dropout_p, seed, "q", q)
    _checks.check_bool(_OP, "return_lse", return_lse)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        _checks.check_finite_number(_OP, "scale", scale)
    chosen = _backends.choose(
        _OP, _BACKENDS, backend, q.device, _limit, q, keys, window, dropout_p, return_lse
    )
    scale, dropout_p, seed = float(scale), float(dropout_p), _dropout.as_seed(dropout_p, seed, q.device)
    if chosen not in ("sdpa", "reference"):
        out, lse, _peaks = local_attention_2d_op(
            q,
            *keys,
            window.height,
            window.width,
            window.kernel_height,
            window.kernel_width,
            window.query_scale,
            window.causal,
            scale,
            dropout_p,
            seed,
            chosen,
        )
        return (out, lse) if return_lse else out
    if chosen == "sdpa":
        return sdpa.forward(q, keys, window, scale)
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    dropout = _dropout.Dropout.of(dropout_p, seed)
    with _checks.no_autocast(q.device):
        out, lse = local_attention_2d_reference(
            q.to(wide), keys.map(lambda x: x.to(wide)), window, scale, dropout
        )
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def _in_parts(
    heads: dict[str, Any],
    extra_mask: Tensor | None,
    window: Window,
    dropout_p: float,
    options: dict[str, Any],
) -> Any:
    """Of DTensors, cut along samples and heads."""
    parts = _sharding.Parts(_OP, "q", heads["q"], (0, 1))
    parts.check_no_dropout(dropout_p)
    out = local_attention_2d(
        **{name: parts.of(name, x, (0, 1)) for name, x in heads.items()},
        grid=(window.height, window.width),
        kernel_size=(window.kernel_height, window.kernel_width),
        query_scale=window.query_scale,
        causal=window.causal,
        extra_mask=parts.of("extra_mask", extra_mask, (0,)),
        **options,
    )
    return parts.join(out, (0, 1))


def _window(grid: tuple[int, int], kernel_size: tuple[int, int], query_scale: int, causal: bool) -> Window:
    sides = ("rows", "columns")
    grid = _checks.checked_pair(_OP, "grid", grid, sides, 1)
    kernel_size = _checks.checked_pair(_OP, "kernel_size", kernel_size, sides, 1)
    if not (kernel_size[0] % 2 and kernel_size[1] % 2):
        raise ValueError(f"{_OP}: kernel_size must be odd, so that it has a centre, got {kernel_size}")
    _checks.check_count(_OP, "query_scale", query_scale, 1)
    _checks.check_bool(_OP, "causal", causal)
    return Window(*grid, *kernel_size, query_scale, causal)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, window: Window) -> None:
    check_head(_OP, "q", q, q)
    if window.queries != q.shape[2]:
        s = window.query_scale
        raise ValueError(
            f"{_OP}: q must have shape [B, H, {window.queries}, D], a raster of {window.height * s} by "
            f"{window.width * s} (query_scale times grid), got {tuple(q.shape)}"
        )
    check_heads(_OP, q, k, v, window.keys, beside="q and grid")


def _keys(
    k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, extra_mask: Tensor | None
) -> Keys:
    B, heads, _, D = k.shape
    if extra_k is None and extra_v is None:
        if extra_mask is not None:
            raise ValueError(f"{_OP}: extra_mask must go with extra_k and extra_v, got it alone")
        none = k.new_empty(B, heads, 0, D)
        return Keys(k, v, none, none, None)
    if extra_k is None or extra_v is None:
        missing, given = ("extra_k", "extra_v") if extra_k is None else ("extra_v", "extra_k")
        raise ValueError(f"{_OP}: {missing} must be given with {given}, got {given} alone")
    for name, x in (("extra_k", extra_k), ("extra_v", extra_v)):
        check_head(_OP, name, x, k, "[B, Hkv, E, D]")
    if extra_k.shape[:2] != k.shape[:2] or extra_k.shape[3] != D:
        raise ValueError(
            f"{_OP}: extra_k must have shape [{B}, {heads}, E, {D}] to go with k, got {tuple(extra_k.shape)}"
        )
    if extra_v.shape != extra_k.shape:
        raise ValueError(
            f"{_OP}: extra_v must have the shape of extra_k, {tuple(extra_k.shape)}, "
            f"got {tuple(extra_v.shape)}"
        )
    if extra_mask is not None:
        if not isinstance(extra_mask, Tensor) or extra_mask.dtype != torch.bool:
            got = extra_mask.dtype if isinstance(extra_mask, Tensor) else type(extra_mask).__name__
            raise TypeError(f"{_OP}: extra_mask must be a boolean tensor, got {got}")
        if extra_mask.shape != (B, extra_k.shape[2]):
            raise ValueError(
                f"{_OP}: extra_mask must have shape [{B}, {extra_k.shape[2]}], [B, E] of extra_k, "
                f"got {tuple(extra_mask.shape)}"
            )
        _checks.check_same_device(_OP, "extra_mask", extra_mask, "q", k)
    return Keys(k, v, extra_k, extra_v, extra_mask)
