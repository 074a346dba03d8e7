# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.merge_attention``: schemas, fake tensors, and what is saved.

The op takes four attentions, of which the last may be None. The inputs are saved: the backward computes the
weights anew from the lses, since the joint lse, one float32, may be off by more than they are.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cogview_kernels._attention import empty_in_order_of, with_rows
from cogview_kernels._torch_ops import Op
from cogview_kernels.merge_attention import native

_OUTPUTS = "Tensor output0, Tensor? output1, Tensor? output2, Tensor? output3"
_INPUTS = f"{_OUTPUTS}, Tensor lse0, Tensor? lse1, Tensor? lse2, Tensor? lse3"
_GRADIENTS = ", ".join(["Tensor"] * 8)

MOST = native.MOST  # attentions of a call


def backend_module(backend: str) -> ModuleType:
    """The module whose ``forward``, ``backward`` and ``limit`` serve ``backend``."""
    if backend == "triton":
        from cogview_kernels.merge_attention import triton_kernels

        return triton_kernels
    return native


def _given(tensors):
    return [x for x in tensors if x is not None]


def _empty_outputs(output0: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """``(out, lse)``."""
    return empty_in_order_of(output0), output0.new_empty(output0.shape[:3], dtype=torch.float32)


def _empty_gradients(dout: Tensor, dlse: Tensor | None, *arguments: Tensor | None) -> tuple[Tensor, ...]:
    """Of four outputs, then of four lses; nothing of those that are missing."""
    outputs = arguments[:MOST]
    return (
        *(dout.new_empty(0) if x is None else empty_in_order_of(x) for x in outputs),
        *(dout.new_empty(0) if x is None else x.new_empty(x.shape[:3], dtype=torch.float32) for x in outputs),
    )


def _forward(*arguments):
    *tensors, backend = arguments
    outputs, lses = _given(tensors[:MOST]), _given(tensors[MOST:])
    out, lse = _empty_outputs(outputs[0])
    if out.numel() > 0:
        contiguous = [x.contiguous() for x in lses]
        backend_module(backend).forward(list(map(with_rows, outputs)), contiguous, out, lse, backend)
    return out, lse


def _backward(dout, dlse, *arguments):
    *tensors, backend = arguments
    gradients = _empty_gradients(dout, dlse, *tensors)
    outputs, lses = _given(tensors[:MOST]), _given(tensors[MOST:])
    if dout.numel() > 0:
        backend_module(backend).backward(
            list(map(with_rows, outputs)),
            [x.contiguous() for x in lses],
            (with_rows(dout), None if dlse is None else dlse.contiguous()),
            (gradients[: len(outputs)], gradients[MOST : MOST + len(outputs)]),
            backend,
        )
    return gradients


def _save(ctx, arguments, outputs):
    *tensors, ctx.backend = arguments
    return tensors


def _differentiate(ctx, saved, dout, dlse):
    if dout is None:
        dout = torch.zeros_like(saved[0])
    gradients = merge_attention_backward_op(dout, dlse, *saved, ctx.backend)
    return *(None if x is None else d for x, d in zip(saved, gradients, strict=True)), None


merge_attention_op = Op(
    f"merge_attention({_INPUTS}, str backend) -> (Tensor, Tensor)",
    kernel=_forward,
    fake=_empty_outputs,
    save=_save,
    backward=_differentiate,
)
merge_attention_backward_op = Op(
    f"merge_attention_backward(Tensor dout, Tensor? dlse, {_INPUTS}, str backend) -> ({_GRADIENTS})",
    kernel=_backward,
    fake=_empty_gradients,
)
