# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.three_region_attention``: registration, fake tensors, what is saved.

Saved for the backward: the inputs, the output and the log-sum-exp. The order of the pivots is derived again
there: that costs microseconds, keeping it for every layer costs memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogview_kernels import _library

_library.define(
    "three_region_attention(Tensor q, Tensor k, Tensor v, Tensor pivots, int block_size, int window_blocks,"
    " float pivot_bias, float scale, float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "three_region_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor pivots,"
    " Tensor out, Tensor lse, int block_size, int window_blocks, float pivot_bias, float scale,"
    " float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor, Tensor)"
)


def _empty_in_order_of(x: Tensor) -> Tensor:
    """Uninitialised, dense, heads inside positions where ``x`` has them so: ``[B, T, H, D]`` or
    ``[B, H, T, D]`` in memory, so that the transposes around the op stay views."""
    B, H, T, D = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(B, T, H, D).transpose(1, 2)
    return x.new_empty(B, H, T, D)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pivots: Tensor,
    block_size: int,
    window_blocks: int,
    pivot_bias: float,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_in_order_of(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, k, v = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
    regions = (pivots, block_size, window_blocks, pivot_bias, scale, dropout_p, seed)
    from cogview_kernels.three_region_attention.triton_kernels import launch_three_region_attention_fwd

    launch_three_region_attention_fwd(q, k, v, out, lse, *regions)
    return out, lse


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pivots: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    window_blocks: int,
    pivot_bias: float,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _empty_in_order_of(q), _empty_in_order_of(k), _empty_in_order_of(v)
    if out.numel() == 0:
        return dq, dk, dv
    dout, q, k, v = (_rows_contiguous(x) for x in (dout, q, k, v))
    if dlse is not None:
        dlse = dlse.contiguous()
    regions = (pivots, block_size, window_blocks, pivot_bias, scale, dropout_p, seed)
    from cogview_kernels.three_region_attention.triton_kernels import launch_three_region_attention_bwd

    launch_three_region_attention_bwd(dout, dlse, q, k, v, out, lse, dq, dk, dv, *regions)
    return dq, dk, dv


class ThreeRegionAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pivots, block_size, window_blocks, pivot_bias, scale, dropout_p, seed, backend):
        regions = (block_size, window_blocks, pivot_bias, scale, dropout_p, seed, backend)
        out, lse = _library.eager("three_region_attention", q, k, v, pivots, *regions)
        ctx.save_for_backward(q, k, v, pivots, out, lse, seed)
        ctx.regions = regions[:5]
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        *tensors, seed = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(tensors[4])
        gradients = _library.eager(
            "three_region_attention_backward", dout, dlse, *tensors, *ctx.regions, seed, ctx.backend
        )
        return *gradients, None, None, None, None, None, None, None, None


def three_region_attention_op(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """By the shortest way to the kernel that differentiates where it must and can be traced."""
    if torch.compiler.is_compiling():
        return torch.ops.cogview_kernels.three_region_attention(q, k, v, *arguments)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return ThreeRegionAttention.apply(q, k, v, *arguments)
    return _library.eager("three_region_attention", q, k, v, *arguments)


_library.implement("three_region_attention", _forward, ThreeRegionAttention)
_library.implement("three_region_attention_backward", _backward)


@torch.library.register_fake("cogview_kernels::three_region_attention")
def _forward_fake(q, k, v, pivots, block_size, window_blocks, pivot_bias, scale, dropout_p, seed, backend):
    return _empty_in_order_of(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("cogview_kernels::three_region_attention_backward")
def _backward_fake(dout, dlse, q, k, v, *rest):
    return _empty_in_order_of(q), _empty_in_order_of(k), _empty_in_order_of(v)
