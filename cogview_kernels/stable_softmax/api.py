# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks, _sharding
from cogview_kernels.stable_softmax.op import backend_module, stable_softmax_op
from cogview_kernels.stable_softmax.reference import stable_softmax_reference

_OP = "stable_softmax"
_BACKENDS = ("triton", "cuda", "cpu", "reference")


def _limit(backend: str, scores: Tensor) -> str:
    return "" if backend == "reference" else backend_module(backend).limit(backend, scores)


def stable_softmax(
    scores: Tensor,
    *,
    alpha: float = 1.0,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Softmax over the last dimension, in the PB-Relax form that survives large scores.

    Equals, with ``x = (scale * scores).masked_fill(~visible, -inf)``::

        torch.softmax(alpha * (x - x.amax(-1, keepdim=True)), dim=-1)

    where ``visible`` is ``mask``, further limited to ``column <= row`` under ``causal``. A row in which
    nothing is visible (or all scores are -inf) gives zeros, not NaN. With ``alpha=32`` and scores made
    from ``q / alpha`` this is the paper's PB-Relax attention: scores stay 32 times farther from the
    fp16 limit and the result is the same.

    Args:
        scores: ``[..., N]``, or ``[..., T, N]`` under ``causal``; float32, float16 or bfloat16 (float64 by
            the reference). Any strides; a last stride other than 1 costs a copy.
        alpha: positive; multiplies the differences to the row's maximum.
        scale: finite; multiplies the scores.
        mask: boolean, broadcasts to ``scores``; True marks what is visible.
        causal: row t sees columns 0 to t (the convention of ``scaled_dot_product_attention``).
        backend: "triton", "cuda", "cpu" or "reference"; None takes the best for the device.

    Returns:
        Probabilities, of the shape and dtype of ``scores``. Arithmetic is in float32 throughout; the
        gradient is computed from this output, so it is all that is saved.

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape or range above is not met, or devices differ.
        NotImplementedError: the named backend does not take float64; "triton" takes fewer than 2^31 rows.
            A DTensor that is cut along what a row's probabilities depend on.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: CogView, arXiv:2105.13290, section 2.4 (Precision Bottleneck Relaxation).
    """
    signature = _backends.signature(_OP, scores, alpha, scale, mask, causal, backend)
    chosen = _backends.passed(signature)
    if chosen is None:
        chosen = _backends.remember(signature, _checked(scores, alpha, scale, mask, causal, backend))
        if _sharding.is_sharded(scores, backend):
            options = {"alpha": alpha, "scale": scale, "causal": causal, "backend": backend}
            return _in_parts(scores, mask, options)
    if chosen == "reference":
        wide = scores if scores.dtype == torch.float64 else scores.float()
        return stable_softmax_reference(wide, alpha=alpha, scale=scale, mask=mask, causal=causal).to(
            scores.dtype
        )
    call = stable_softmax_op.for_signature(signature)
    return call(scores, float(alpha), float(scale), mask, causal, chosen)


def _in_parts(scores: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Any:
    """Of DTensors, cut along all dimensions but those that a row's probabilities depend on."""
    rows = range(scores.dim() - (2 if options["causal"] else 1))
    parts = _sharding.Parts(_OP, "scores", scores, rows)
    if mask is not None:
        missing = scores.dim() - mask.dim()
        same = (size == scores.shape[i + missing] for i, size in enumerate(mask.shape))
        dims = [i + missing if is_same else None for i, is_same in enumerate(same)]
        mask = parts.of("mask", mask, dims)
    return parts.join(stable_softmax(parts.of("scores", scores, rows), mask=mask, **options), rows)


def _checked(
    scores: Tensor, alpha: float, scale: float, mask: Tensor | None, causal: bool, backend: str | None
) -> str:
    """The backend that takes the call, which passes every check."""
    _checks.check_float(_OP, "scores", scores)
    if scores.dim() == 0:
        raise ValueError(f"{_OP}: scores must have at least one dimension, got a scalar")
    _checks.check_bool(_OP, "causal", causal)
    if causal and scores.dim() < 2:
        raise ValueError(f"{_OP}: causal needs scores of [..., T, N], got shape {tuple(scores.shape)}")
    _checks.check_finite_number(_OP, "alpha", alpha, positive=True)
    _checks.check_finite_number(_OP, "scale", scale)
    _checks.check_tensors(_OP, or_none=True, mask=mask)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{_OP}: mask must be boolean (True = visible), got {mask.dtype}; try mask != 0")
        _checks.check_same_device(_OP, "mask", mask, "scores", scores)
        _checks.check_broadcasts(_OP, "mask", mask, "scores", scores)
    return _backends.choose(_OP, _BACKENDS, backend, scores.device, _limit, scores)
