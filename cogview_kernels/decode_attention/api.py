# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks, _sharding
from cogview_kernels._attention import (
    check_head,
    check_heads,
    check_layout,
    check_lengths,
    check_pivots_of_cache,
)
from cogview_kernels.decode_attention import sdpa
from cogview_kernels.decode_attention.op import backend_module, decode_attention_op
from cogview_kernels.decode_attention.reference import decode_attention_reference
from cogview_kernels.layout import ThreeRegionLayout

_OP = "decode_attention"
_BACKENDS = ("cpu", "triton", "cuda", "sdpa", "reference")


def _limit(backend: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str:
    if backend in ("sdpa", "reference"):
        return ""
    return backend_module(backend).limit(backend, q, k_cache, v_cache)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    layout: ThreeRegionLayout | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of the last few positions of each sequence over a cache of fixed shape.

    Query t of sample b stands at position ``lengths[b] - Tq + t`` and sees the keys up to its own, so this is
    the last ``Tq`` rows of causal attention over the first ``lengths[b]`` positions::

        position = lengths[:, None] - Tq + torch.arange(Tq)
        seen = torch.arange(S) <= position[..., None]
        scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=seen[:, None], scale=scale)

    and with ``layout`` the last rows of :func:`cogview_kernels.three_region_attention`. Shapes do not depend
    on the lengths and nothing waits for the device, so that a step can be captured in a CUDA graph.

    Args:
        q: ``[B, H, Tq, D]``; float32, float16, bfloat16 or float64. Its keys and values are cached already.
        k_cache, v_cache: ``[B, Hkv, S, D]``, dtype and device of ``q``; H is a multiple of Hkv. What lies at
            or past ``lengths`` has no influence, whatever it is. Autocast casts q and the caches, as for
            ``scaled_dot_product_attention``: keep the caches in its dtype, or each call copies them.
        lengths: int32 or int64 ``[B]`` on the device of ``q``: positions written so far, those of ``q``
            included, in ``[0, S]``. A query before position 0 gets zeros.
        layout: a causal :class:`ThreeRegionLayout`: only the keys that it allows are seen.
        starts: int32 or int64 ``[B]`` on the device of ``q``, for padding on the left: keys before a
            sample's start have no influence, whatever they are, and a query before it gets zeros. Blocks of
            the layout are counted from the start; pivots are positions in the cache.
        scale: finite, multiplies ``q @ k^T``; None is ``1 / sqrt(D)``.
        backend: "cpu", "triton", "cuda", "sdpa" or "reference"; None takes the best for device and arguments.

    Returns:
        Shape and dtype of ``q``.

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape above is not met, or devices differ; on the CPU also lengths or pivots
            out of range.
        NotImplementedError: a limit of the backend asked for ("cpu", "triton", "cuda": no derivative, no
            float64, D up to 256; "cuda": D a multiple of 8). Without ``backend`` "sdpa" steps in where a
            gradient is needed, not for derivatives in forward mode.
            A DTensor that is cut elsewhere than along samples and heads.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: CogView, arXiv:2105.13290, section 4.1, with keys and values cached instead of hidden states.
    """
    if torch._C._is_any_autocast_enabled():
        q, k_cache, v_cache = _checks.autocast(q, k_cache, v_cache)
    pivots, is_causal = getattr(layout, "pivots", layout), getattr(layout, "causal", True)
    regions = pivots, is_causal, type(layout) is ThreeRegionLayout
    inputs = q, k_cache, v_cache, lengths, *regions, starts
    signature = _backends.signature(_OP, *inputs, scale, backend)
    run = decode_attention_op.ready(signature)
    if run is not None:
        return run(q, k_cache, v_cache, lengths, layout, starts)
    chosen = _backends.passed(signature)
    if chosen is None:
        _check(q, k_cache, v_cache, lengths, layout)
        _checks.check_starts(_OP, starts, q)
        if scale is not None:
            _checks.check_finite_number(_OP, "scale", scale)
        if _sharding.is_sharded(q, backend):
            options = {"scale": scale, "backend": backend}
            return _in_parts(q, k_cache, v_cache, lengths, layout, starts, options)
        chosen = _backends.choose(_OP, _BACKENDS, backend, q.device, _limit, q, k_cache, v_cache)
        _backends.remember(signature, chosen)
    S = k_cache.shape[2]
    is_empty = S == 0 or q.shape[2] == 0
    if chosen != "cpu" or is_empty:  # else the kernel looks at them by itself
        check_lengths(_OP, lengths, S, "the cache's size")
        check_pivots_of_cache(_OP, layout, S)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if is_empty:
        return torch.zeros_like(q)
    if chosen == "sdpa":
        return sdpa.forward(q, k_cache, v_cache, lengths, layout, scale, starts)
    if chosen == "reference":
        wide = q.dtype if q.dtype == torch.float64 else torch.float32
        with _checks.no_autocast(q.device):
            return decode_attention_reference(
                q.to(wide), k_cache.to(wide), v_cache.to(wide), lengths, layout, scale, starts
            ).to(q.dtype)
    if chosen == "cpu":
        decode_attention_op.prepare(signature, q, k_cache, v_cache, lengths, layout, starts, scale)
    call = decode_attention_op.for_signature(signature)
    if layout is None:
        return call(q, k_cache, v_cache, lengths, None, 1, 1, 0.0, 1, starts, scale, chosen)
    return call(
        q,
        k_cache,
        v_cache,
        lengths,
        layout.pivots,
        layout.block_size,
        layout.window_blocks,
        float(layout.pivot_bias),
        layout.density,
        starts,
        scale,
        chosen,
    )


def _in_parts(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    layout: ThreeRegionLayout | None,
    starts: Tensor | None,
    options: dict[str, Any],
) -> Any:
    """Of DTensors, cut along samples and heads."""
    parts = _sharding.Parts(_OP, "q", q, (0, 1))
    tensors = (("q", q), ("k_cache", k_cache), ("v_cache", v_cache))
    q, k_cache, v_cache = (parts.of(name, x, (0, 1)) for name, x in tensors)
    if layout is not None:
        layout = replace(layout, pivots=parts.of("layout.pivots", layout.pivots, (0,)))
    lengths, starts = parts.of("lengths", lengths, (0,)), parts.of("starts", starts, (0,))
    out = decode_attention(q, k_cache, v_cache, lengths, layout=layout, starts=starts, **options)
    return parts.join(out, (0, 1))


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, layout: ThreeRegionLayout | None
) -> None:
    check_head(_OP, "q", q, q, "[B, H, Tq, D]")
    check_heads(_OP, q, k_cache, v_cache, None, ("k_cache", "v_cache"))
    _checks.check_positions(_OP, "lengths", lengths, "q", q)
    check_layout(_OP, layout, "q", q, causal=True)
