# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks, _dropout, _sharding
from cogview_kernels._attention import check_head, check_heads, check_layout
from cogview_kernels.layout import ThreeRegionLayout
from cogview_kernels.three_region_attention import sdpa
from cogview_kernels.three_region_attention.op import backend_module, three_region_attention_op
from cogview_kernels.three_region_attention.reference import three_region_attention_reference

_OP = "three_region_attention"
_BACKENDS = ("triton", "cuda", "cpu", "sdpa", "reference")
_ALL = (128, 2**24)  # size and number of the blocks of a window that no sequence reaches beyond


def _limit(backend: str, q: Tensor, dropout_p: float, return_lse: bool) -> str:
    if backend == "reference":
        return ""
    if backend == "sdpa":
        return sdpa.limit(dropout_p, return_lse)
    return backend_module(backend).limit(backend, q)


def three_region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout | None,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a block window and gathered pivot keys, under one softmax.

    Equals, with ``far`` the pivots left of a query's window, and right of it unless ``layout.causal`` (see
    :class:`ThreeRegionLayout`)::

        bias = torch.zeros(B, T, T).masked_fill(far, layout.pivot_bias)
        bias = bias.masked_fill(~layout.dense_mask(T), -inf)
        scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None], scale=scale)

    but costs what a query sees, not T. Scores, softmax and sums are in float32 and never stored, so it is
    PB-Relax attention by construction: scores far past the fp16 limit do no harm.

    Args:
        q: ``[B, H, T, D]``; float32, float16, bfloat16 or float64 (which "sdpa" and "reference" take).
        k, v: ``[B, Hkv, T, D]``, dtype and device of ``q``; H is a multiple of Hkv, and query head h reads
            key head ``h // (H // Hkv)``. Any strides with the last dimension contiguous: views into a packed
            ``[B, T, 3, H, D]`` projection are read in place. Under autocast q, k and v may have any of these
            dtypes, and float32 is cast as for ``scaled_dot_product_attention``.
        layout: which keys are seen; its pivots ``[B, P]`` lie on the device of ``q``. None: all up to the
            query's own, which is dense causal attention.
        starts: int32 or int64 ``[B]`` on the device of ``q``, for padding on the left: keys before a
            sample's start are not seen, and queries before it see nothing: their output is 0, their lse -inf.
            Blocks are counted from the start, so a sample gives what it would give without its padding;
            pivots are positions in the padded sequence.
        scale: finite, multiplies ``q @ k^T``; None is ``1 / sqrt(D)``.
        dropout_p: in [0, 1): probability with which a joint probability is dropped, the others grow by
            ``1 / (1 - dropout_p)``. Every backend draws the same mask from the same seed.
        seed: for dropout, an int of at most 64 bits or a 0-d int64 tensor, on the CPU or the device of ``q``;
            None draws one from PyTorch's CPU generator, or, while a CUDA graph is captured, from the GPU's,
            so that each replay drops others.
        return_lse: also return the log of the softmax's denominator (before dropout), differentiable.
        backend: "cpu", "triton", "cuda", "sdpa" or "reference"; None takes the best for the device.

    Returns:
        ``out``, shape and dtype of ``q``; with ``return_lse`` ``(out, lse)``, ``lse`` ``[B, H, T]``
        in float32 (float64 for float64).

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape or range above is not met, or devices differ. The values of pivots are checked on
            the CPU alone: reading them on a GPU would wait for it.
        NotImplementedError: a limit of the backend asked for ("sdpa": no dropout, no lse; "cuda": float16 and
            D of 32, 64, 80, 96 or 128; "cpu", "triton": no float64, D up to 256).
            Without ``backend`` "sdpa" steps in, or where that cannot, "reference". Also a derivative that
            kernels do not have: of second order, or in forward mode.
            A DTensor that is cut elsewhere than along samples and heads, or dropout of one.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: CogView, arXiv:2105.13290, section 4.1 (three-region sparse attention) and section 2.4.
    """
    if torch._C._is_any_autocast_enabled():
        q, k, v = _checks.autocast(q, k, v)
    regions = getattr(layout, "pivots", layout), type(layout) is ThreeRegionLayout
    numbers = (scale, dropout_p, _dropout.for_signature(seed), return_lse)
    signature = _backends.signature(_OP, q, k, v, *regions, starts, *numbers, backend)
    chosen = _backends.passed(signature)
    if chosen is None:
        check_head(_OP, "q", q, q)
        check_heads(_OP, q, k, v, q.shape[2])
        check_layout(_OP, layout, "q", q)
        _checks.check_starts(_OP, starts, q)
        _checks.check_dropout(_OP, dropout_p, seed, "q", q)
        _checks.check_bool(_OP, "return_lse", return_lse)
        if scale is not None:
            _checks.check_finite_number(_OP, "scale", scale)
        if _sharding.is_sharded(q, backend):
            options = {"scale": scale, "return_lse": return_lse, "backend": backend}
            return _in_parts(q, k, v, layout, starts, dropout_p, options)
        chosen = _backends.choose(_OP, _BACKENDS, backend, q.device, _limit, q, dropout_p, return_lse)
        _backends.remember(signature, chosen)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    dropout_p, seed = float(dropout_p), _dropout.as_seed(dropout_p, seed, q.device)
    if layout is None:
        layout = ThreeRegionLayout(q.new_empty((q.shape[0], 0), dtype=torch.int32), *_ALL)
    if chosen not in ("sdpa", "reference"):
        out, lse, _residuals = three_region_attention_op.for_signature(signature)(
            q,
            k,
            v,
            layout.pivots,
            layout.block_size,
            layout.window_blocks,
            float(layout.pivot_bias),
            layout.density,
            layout.causal,
            starts,
            scale,
            dropout_p,
            seed,
            chosen,
        )
        return (out, lse) if return_lse else out
    layout.check_pivots(_OP, q.shape[2])
    if chosen == "sdpa":
        return sdpa.forward(q, k, v, layout, scale, starts)
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    with _checks.no_autocast(q.device):
        dropout = _dropout.Dropout.of(dropout_p, seed)
        out, lse = three_region_attention_reference(
            q.to(wide), k.to(wide), v.to(wide), layout, scale, dropout, starts
        )
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def _in_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout | None,
    starts: Tensor | None,
    dropout_p: float,
    options: dict[str, Any],
) -> Any:
    """Of DTensors, cut along samples and heads."""
    parts = _sharding.Parts(_OP, "q", q, (0, 1))
    parts.check_no_dropout(dropout_p)
    q, k, v = (parts.of(name, x, (0, 1)) for name, x in (("q", q), ("k", k), ("v", v)))
    if layout is not None:
        layout = replace(layout, pivots=parts.of("layout.pivots", layout.pivots, (0,)))
    starts = parts.of("starts", starts, (0,))
    return parts.join(three_region_attention(q, k, v, layout, starts=starts, **options), (0, 1))
