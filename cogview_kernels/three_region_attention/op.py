# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.three_region_attention``: schemas, fake tensors, and what is saved.

Saved are q, k, v, the output, the log of the softmax's denominator, and what else a backend wants to find
again (``residuals``, int32, of a length that only the backend knows): probabilities are computed anew.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cogview_kernels import _flops
from cogview_kernels._attention import empty_in_order_of, with_rows
from cogview_kernels._dropout import Dropout
from cogview_kernels._torch_ops import Op
from cogview_kernels.layout import ThreeRegionLayout
from cogview_kernels.three_region_attention import native

_FLAT = (
    "Tensor pivots, int block_size, int window_blocks, float pivot_bias, SymInt density, bool causal, "
    "Tensor? starts, float scale, float dropout_p, Tensor? seed, str backend"
)


def backend_module(backend: str) -> ModuleType:
    """The module whose ``forward``, ``backward`` and ``limit`` serve ``backend``."""
    if backend == "triton":
        from cogview_kernels.three_region_attention import triton_kernels

        return triton_kernels
    return native


def _empty_outputs(
    q: Tensor, k: Tensor, v: Tensor, pivots: Tensor, block_size: int, window_blocks: int, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, residuals)``."""
    size = 0
    if rest[-1] == "triton" and q.numel() > 0:
        size = backend_module("triton").residuals_size(q, pivots, block_size, window_blocks)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return empty_in_order_of(q), lse, q.new_empty(size, dtype=torch.int32)


def _empty_gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """``(dq, dk, dv)``; one that is not wanted has no elements."""
    wanted = rest[-3:]
    return tuple(
        empty_in_order_of(x) if w else x.new_empty(0) for x, w in zip((q, k, v), wanted, strict=True)
    )


def _forward(
    q, k, v, pivots, block_size, window_blocks, pivot_bias, density, causal, starts,
    scale, dropout_p, seed, backend,
):  # fmt: skip
    out, lse, residuals = _empty_outputs(q, k, v, pivots, block_size, window_blocks, backend)
    if out.numel() > 0:
        layout = ThreeRegionLayout.unchecked(pivots, block_size, window_blocks, pivot_bias, density, causal)
        dropout = Dropout.of(dropout_p, seed)
        starts = None if starts is None else starts.contiguous()
        inputs = with_rows(q), with_rows(k), with_rows(v)
        results = out, lse, residuals
        backend_module(backend).forward(*inputs, layout, starts, scale, dropout, results, backend)
    return out, lse, residuals


def _backward(
    dout, dlse, q, k, v, out, lse, residuals,
    pivots, block_size, window_blocks, pivot_bias, density, causal, starts,
    scale, dropout_p, seed, backend, *wanted,
):  # fmt: skip
    gradients = _empty_gradients(dout, dlse, q, k, v, *wanted)
    if q.numel() == 0 or not any(wanted):
        return tuple(x.zero_() for x in gradients)
    layout = ThreeRegionLayout.unchecked(pivots, block_size, window_blocks, pivot_bias, density, causal)
    dropout = Dropout.of(dropout_p, seed)
    starts = None if starts is None else starts.contiguous()
    inputs = with_rows(q), with_rows(k), with_rows(v)
    saved = with_rows(out), lse.contiguous(), residuals
    doutputs = with_rows(dout), None if dlse is None else dlse.contiguous()
    made = tuple(x if w else None for x, w in zip(gradients, wanted, strict=True))
    backend_module(backend).backward(*inputs, layout, starts, scale, dropout, saved, doutputs, made, backend)
    return gradients


def _save(ctx, arguments, outputs):
    q, k, v, pivots, *ctx.regions, starts, ctx.scale, ctx.dropout_p, seed, ctx.backend = arguments
    return q, k, v, *outputs, pivots, starts, seed


def _differentiate(ctx, saved, dout, dlse, _):
    q, k, v, out, lse, residuals, pivots, starts, seed = saved
    if dout is None:
        dout = torch.zeros_like(out)
    wanted = ctx.needs_input_grad[:3]
    gradients = three_region_attention_backward_op(
        dout, dlse, q, k, v, out, lse, residuals, pivots, *ctx.regions, starts,
        ctx.scale, ctx.dropout_p, seed, ctx.backend, *wanted,
    )  # fmt: skip
    return *(x if w else None for x, w in zip(gradients, wanted, strict=True)), *(None,) * 11


def _pairs(of):
    """Visible pairs of a query and a key, over all heads."""
    regions = of["pivots"], of["block_size"], of["window_blocks"]
    layout = ThreeRegionLayout.unchecked(*regions, 0.0, causal=of["causal"])
    starts = None if of["starts"] is None else _flops.values(of["starts"])
    return of["q"].shape[1] * layout.pairs(of["q"].shape[2], _flops.values(of["pivots"]), starts)


three_region_attention_op = Op(
    f"three_region_attention(Tensor q, Tensor k, Tensor v, {_FLAT}) -> (Tensor, Tensor, Tensor)",
    kernel=_forward,
    fake=_empty_outputs,
    save=_save,
    backward=_differentiate,
    flops=lambda of, _: 4 * _pairs(of) * of["q"].shape[3],
)
three_region_attention_backward_op = Op(
    "three_region_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, Tensor residuals, {_FLAT}, bool needs_dq, bool needs_dk, bool needs_dv)"
    " -> (Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_empty_gradients,
    flops=lambda of, gradients: _flops.attention_backward(_pairs(of), of["q"].shape[3], gradients),
)
