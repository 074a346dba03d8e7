# SPDX-License-Identifier: Apache-2.0
"""Merging attentions through the compiled extension, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cogview_kernels import _checks, _extension

# csrc/merge_attention/merge_attention.h
MOST = 4


def limit(backend: str, outputs: Sequence[Tensor]) -> str:
    """Why the kernels cannot take ``outputs``, and the way out; empty when they can."""
    if outputs[0].shape[3] == 0:
        return f"the {backend} backend needs a head size of 1 or more, got 0; use backend='reference'"
    reason = _checks.kernel_dtype_limit(backend, "outputs", outputs[0])
    return reason and f"{reason}; use backend='reference'"


def _places(tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """None in place of those that are missing."""
    return (*tensors, *[None] * (MOST - len(tensors)))


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return (*(x.data_ptr() for x in tensors), *[0] * (MOST - len(tensors)))


def _shape(outputs: Sequence[Tensor]) -> tuple[int, ...]:
    return *outputs[0].shape, len(outputs)


def forward(
    outputs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor, backend: str
) -> None:
    """Fills ``out`` and ``lse``. Rows are contiguous."""
    _extension.call(
        "merge_attention_fwd",
        backend,
        _places(outputs),
        _addresses(lses),
        out,
        lse.data_ptr(),
        _shape(outputs),
        _extension.DTYPE_CODES[out.dtype],
    )


def backward(
    outputs: Sequence[Tensor],
    lses: Sequence[Tensor],
    doutputs: tuple[Tensor, Tensor | None],
    gradients: tuple[Sequence[Tensor], Sequence[Tensor]],
    backend: str,
) -> None:
    """Fills ``gradients``, of outputs and lses; ``doutputs``: the gradients of out and lse."""
    dout, dlse = doutputs
    _extension.call(
        "merge_attention_bwd",
        backend,
        _places(outputs),
        _addresses(lses),
        dout,
        0 if dlse is None else dlse.data_ptr(),
        _places(gradients[0]),
        _addresses(gradients[1]),
        _shape(outputs),
        _extension.DTYPE_CODES[dout.dtype],
    )
