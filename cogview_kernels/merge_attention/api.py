# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks, _sharding
from cogview_kernels.merge_attention.op import MOST, backend_module, merge_attention_op
from cogview_kernels.merge_attention.reference import merge_attention_reference

_OP = "merge_attention"
_BACKENDS = ("triton", "cpu", "reference")


def _limit(backend: str, outputs: Sequence[Tensor]) -> str:
    return "" if backend == "reference" else backend_module(backend).limit(backend, outputs)


def merge_attention(
    outputs: Sequence[Tensor],
    lses: Sequence[Tensor],
    *,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention to all keys together, from several attentions of the same queries to disjoint keys.

    Equals::

        lse = torch.stack(lses).logsumexp(0)
        out = sum((lse_i - lse).exp()[..., None] * output for output, lse_i in zip(outputs, lses))

    exactly, as if all keys had been under one softmax, and is differentiable through ``lses`` too: take them
    from calls with ``return_lse=True``. Up to four attentions are merged in one pass over memory, each
    further three in one more.

    Args:
        outputs: ``[B, H, T, D]`` each, one or more, of one dtype and device: float32, float16, bfloat16, or
            float64 (which "reference" takes). Any strides with the last dimension contiguous.
        lses: as many ``[B, H, T]``, the log of each softmax's denominator, float32 (float64 for float64).
            An lse of -inf is that of a query which saw no key there; where all are, ``out`` is 0.
        return_lse: also return the joint lse, so that the result can be merged again.
        backend: "cpu", "triton" or "reference"; None takes the best for the device.

    Returns:
        ``out``, shape and dtype of the outputs; with ``return_lse`` ``(out, lse)``, ``lse`` ``[B, H, T]`` in
        the dtype of the lses.

    Raises:
        TypeError: a dtype or type above is not met.
        ValueError: a number or shape above is not met, or devices differ.
        NotImplementedError: a limit of the backend asked for ("cpu" and "triton": no float64; "triton": D up
            to 1024, fewer than 2^31 rows). Without ``backend`` "reference" steps in. Also a derivative that
            kernels do not have: of second order, or in forward mode.
            A DTensor that is cut elsewhere than along samples and heads.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: Online softmax, Milakov and Gimelshein, arXiv:1805.02867, section 3.
    """
    outputs, lses = _checked(outputs, lses)
    _checks.check_bool(_OP, "return_lse", return_lse)
    if _sharding.is_sharded(outputs[0], backend):
        parts = _sharding.Parts(_OP, "outputs[0]", outputs[0], (0, 1))
        outputs = [parts.of(f"outputs[{i}]", x, (0, 1)) for i, x in enumerate(outputs)]
        lses = [parts.of(f"lses[{i}]", x, (0, 1)) for i, x in enumerate(lses)]
        merged = merge_attention(outputs, lses, return_lse=return_lse, backend=backend)
        return parts.join(merged, (0, 1))
    chosen = _backends.choose(_OP, _BACKENDS, backend, outputs[0].device, _limit, outputs)
    if chosen == "reference":
        wide = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
        out, lse = merge_attention_reference([x.to(wide) for x in outputs], lses)
        out = out.to(outputs[0].dtype)
    else:
        out, lse = _merged(outputs, lses, chosen)
    return (out, lse) if return_lse else out


def _merged(outputs: list[Tensor], lses: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    """Four at a time."""
    nothing = [None] * (MOST - len(outputs))
    out, lse = merge_attention_op(*outputs[:MOST], *nothing, *lses[:MOST], *nothing, backend)
    if len(outputs) <= MOST:
        return out, lse
    return _merged([out, *outputs[MOST:]], [lse, *lses[MOST:]], backend)


def _checked(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    for name, given in (("outputs", outputs), ("lses", lses)):
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{_OP}: {name} must be a list or tuple of tensors, got {type(given).__name__}")
    if len(outputs) == 0 or len(lses) != len(outputs):
        raise ValueError(
            f"{_OP}: outputs and lses must be as many, at least 1 each, got {len(outputs)} and {len(lses)}"
        )
    first = outputs[0]
    _checks.check_float(_OP, "outputs[0]", first)
    if first.dim() != 4:
        raise ValueError(f"{_OP}: outputs[0] must have shape [B, H, T, D], got {tuple(first.shape)}")
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    for i, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        for name, x, dtype, shape in (
            (f"outputs[{i}]", output, first.dtype, first.shape),
            (f"lses[{i}]", lse, wide, first.shape[:3]),
        ):
            _checks.check_float(_OP, name, x)
            if x.dtype != dtype:
                raise TypeError(f"{_OP}: {name} must be {dtype}, got {x.dtype}")
            if x.shape != shape:
                raise ValueError(f"{_OP}: {name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
            _checks.check_same_device(_OP, name, x, "outputs[0]", first)
    return list(outputs), list(lses)
