# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.local_attention_2d``: schemas, fake tensors, and what is saved.

Saved are the inputs, the output, and the log of the softmax's denominator, which Triton's kernels need in two
parts (``peaks``): probabilities are computed anew.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cogview_kernels import _flops
from cogview_kernels._attention import empty_in_order_of, with_rows
from cogview_kernels._dropout import Dropout
from cogview_kernels._torch_ops import Op
from cogview_kernels.local_attention_2d import native
from cogview_kernels.local_attention_2d.window import Keys, Window

_KEYS = "Tensor k, Tensor v, Tensor extra_k, Tensor extra_v, Tensor? extra_mask"
_FLAT = (
    "SymInt height, SymInt width, int kernel_height, int kernel_width, int query_scale, bool causal, "
    "float scale, float dropout_p, Tensor? seed, str backend"
)


def backend_module(backend: str) -> ModuleType:
    """The module whose ``forward``, ``backward`` and ``limit`` serve ``backend``."""
    if backend == "triton":
        from cogview_kernels.local_attention_2d import triton_kernels

        return triton_kernels
    return native


def _empty_outputs(q: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, peaks)``."""
    B, H, T, _ = q.shape
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    peaks = lse.new_empty((B, H, 2, T) if rest[-1] == "triton" else 0)
    return empty_in_order_of(q), lse, peaks


def _empty_gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor, extra_v: Tensor,
    *_: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of q, k, v, extra_k and extra_v."""
    return tuple(map(empty_in_order_of, (q, k, v, extra_k, extra_v)))


def _forward(
    q, k, v, extra_k, extra_v, extra_mask,
    height, width, kernel_height, kernel_width, query_scale, causal, scale, dropout_p, seed, backend,
):  # fmt: skip
    outputs = _empty_outputs(q, backend)
    if q.numel() > 0:
        window = Window(height, width, kernel_height, kernel_width, query_scale, causal)
        keys = Keys(k, v, extra_k, extra_v, extra_mask).map(with_rows)
        dropout = Dropout.of(dropout_p, seed)
        backend_module(backend).forward(with_rows(q), keys, window, scale, dropout, outputs, backend)
    return outputs


def _backward(
    dout, dlse, q, k, v, extra_k, extra_v, extra_mask, out, lse, peaks,
    height, width, kernel_height, kernel_width, query_scale, causal, scale, dropout_p, seed, backend,
):  # fmt: skip
    gradients = _empty_gradients(dout, dlse, q, k, v, extra_k, extra_v)
    if q.numel() == 0:
        return tuple(x.zero_() for x in gradients)
    window = Window(height, width, kernel_height, kernel_width, query_scale, causal)
    keys = Keys(k, v, extra_k, extra_v, extra_mask).map(with_rows)
    saved = with_rows(out), lse.contiguous(), peaks
    doutputs = with_rows(dout), None if dlse is None else dlse.contiguous()
    dropout = Dropout.of(dropout_p, seed)
    backend_module(backend).backward(
        with_rows(q), keys, window, scale, dropout, saved, doutputs, gradients, backend
    )
    return gradients


def _save(ctx, arguments, outputs):
    q, k, v, extra_k, extra_v, extra_mask, *ctx.options, seed, ctx.backend = arguments
    return q, k, v, extra_k, extra_v, extra_mask, *outputs, seed


def _differentiate(ctx, saved, dout, dlse, _):
    *inputs_and_outputs, seed = saved
    if dout is None:
        dout = torch.zeros_like(inputs_and_outputs[-3])
    gradients = local_attention_2d_backward_op(
        dout, dlse, *inputs_and_outputs, *ctx.options, seed, ctx.backend
    )
    return *gradients, *(None,) * 11


def _pairs(of):
    """Visible pairs of a query and a key, over all heads."""
    B, H, T, _ = of["q"].shape
    extra = B * of["extra_k"].shape[2]
    if of["extra_mask"] is not None and (mask := _flops.values(of["extra_mask"])) is not None:
        extra = sum(map(sum, mask))
    names = ("height", "width", "kernel_height", "kernel_width", "query_scale", "causal")
    return H * (B * Window(*(of[name] for name in names)).pairs + T * extra)


def _backward_flops(of, gradients):
    dq, dk, dv, *_ = gradients
    return _flops.attention_backward(_pairs(of), of["q"].shape[3], (dq, dk, dv))


local_attention_2d_op = Op(
    f"local_attention_2d(Tensor q, {_KEYS}, {_FLAT}) -> (Tensor, Tensor, Tensor)",
    kernel=_forward,
    fake=_empty_outputs,
    save=_save,
    backward=_differentiate,
    flops=lambda of, _: 4 * _pairs(of) * of["q"].shape[3],
)
local_attention_2d_backward_op = Op(
    f"local_attention_2d_backward(Tensor dout, Tensor? dlse, Tensor q, {_KEYS}, Tensor out, Tensor lse, "
    "Tensor peaks, "
    f"{_FLAT}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_empty_gradients,
    flops=_backward_flops,
)
