# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.three_region_attention``: registration, fake tensors, and what is saved.

Saved are q, k, v, the output and the log of the softmax's denominator: probabilities are computed anew. So is
the order of the pivots: that costs microseconds, keeping it for every layer costs memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogview_kernels import _extension, _library

_OP = "three_region_attention"
_LARGEST_HEAD = 256
_CUDA_HEADS = (32, 64, 80, 96, 128)
_LAYOUT = "Tensor pivots, int block_size, int window_blocks, float pivot_bias"
_OPTIONS = "float scale, float dropout_p, Tensor? seed, str backend"
_library.define(f"{_OP}(Tensor q, Tensor k, Tensor v, {_LAYOUT}, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    f"{_OP}_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_LAYOUT}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)


def _rows(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous: kernels take any other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strided(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()[:3]


def _empty_in_order_of(x: Tensor) -> Tensor:
    """Uninitialised and dense, heads inside positions where ``x`` has them so: transposes around the op then
    stay views."""
    B, H, T, D = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(B, T, H, D).transpose(1, 2)
    return x.new_empty(B, H, T, D)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """``(out, lse)``."""
    return _empty_in_order_of(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def kernel_limit(q: Tensor, backend: str) -> str:
    """Why the kernels of ``backend`` cannot take ``q``, and the way out; empty when they can."""
    _, _, T, D = q.shape
    instead = "use backend='sdpa'"
    if T >= 2**30:
        return f"{_OP}: the {backend} backend takes T below 2^30, got {T}; {instead}"
    if backend == "cuda" and q.dtype != torch.float16:
        return (
            f"{_OP}: the cuda backend computes in float16, got {q.dtype}; convert, use autocast, or {instead}"
        )
    if backend == "cuda" and D not in _CUDA_HEADS:
        heads = ", ".join(map(str, _CUDA_HEADS))
        return f"{_OP}: the cuda backend takes head sizes {heads}, got {D}; {instead}"
    if D > _LARGEST_HEAD:
        return f"{_OP}: the {backend} backend takes head sizes up to {_LARGEST_HEAD}, got {D}; {instead}"
    return ""


def _aligned(x: Tensor) -> Tensor:
    """``x`` with every row at a multiple of 16 bytes, which is how the CUDA kernels read."""
    fits = x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s, n in zip(x.stride(), x.shape[:3]) if n > 1)  # noqa: B905
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _arguments(q, k, pivots, block_size, window_blocks, pivot_bias, scale, dropout_p, seed, sorted_pivots):
    """What both directions take, from the shape on. ``pivots`` is contiguous."""
    B, H, T, D = q.shape
    dropout: tuple[int, float, int, int] = (0, 1.0, 0, 0)
    if dropout_p > 0:
        on_device = seed.device.type == "cuda"
        seeds = (0, seed.data_ptr()) if on_device else (int(seed) % 2**64, 0)
        dropout = (min(round(dropout_p * 2**32), 2**32 - 1), 1 / (1 - dropout_p), *seeds)
    listed = (pivots.data_ptr(), pivots.element_size())
    layout = (listed, pivots.shape[1], min(block_size, 2**30), min(window_blocks, 2**30), pivot_bias)
    address = 0 if sorted_pivots is None else sorted_pivots.data_ptr()
    code = _extension.DTYPE_CODES[q.dtype]
    return (B, H, k.shape[1], T, D), layout, scale, dropout, code, address


def _sorted_pivots(q, pivots, block_size, window_blocks):
    """Room for the pivots that some query sees as far keys."""
    P = 0 if block_size * window_blocks >= q.shape[2] else pivots.shape[1]
    return pivots.new_empty(q.shape[0], P, dtype=torch.int32)


def _forward(q, k, v, pivots, block_size, window_blocks, pivot_bias, scale, dropout_p, seed, backend):
    out, lse = _empty_outputs(q)
    if out.numel() == 0:
        return out, lse
    if limit := kernel_limit(q, backend):
        raise NotImplementedError(limit)
    q, k, v = _rows(q), _rows(k), _rows(v)
    if backend == "triton":
        from cogview_kernels.three_region_attention import triton_kernels

        regions = (pivots, block_size, window_blocks, pivot_bias, scale, dropout_p, seed)
        triton_kernels.launch_three_region_attention_fwd(q, k, v, out, lse, *regions)
        return out, lse
    pivots = pivots.contiguous()
    sorted_pivots = None
    if backend == "cuda":
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
        sorted_pivots = _sorted_pivots(q, pivots, block_size, window_blocks)
        place = torch.cuda.current_stream().cuda_stream
        kernel = _extension.native.three_region_attention_fwd_cuda
    else:
        place = torch.get_num_threads()
        kernel = _extension.native.three_region_attention_fwd_cpu
    shared = _arguments(
        q, k, pivots, block_size, window_blocks, pivot_bias, scale, dropout_p, seed, sorted_pivots
    )
    kernel(_strided(q), _strided(k), _strided(v), _strided(out), lse.data_ptr(), *shared, place)
    return out, lse


def _backward(
    dout, dlse, q, k, v, out, lse,
    pivots, block_size, window_blocks, pivot_bias, scale, dropout_p, seed, backend,
):  # fmt: skip
    gradients = _empty_in_order_of(q), _empty_in_order_of(k), _empty_in_order_of(v)
    if q.numel() == 0:
        dq, dk, dv = gradients
        return dq, dk.zero_(), dv.zero_()
    if limit := kernel_limit(q, backend):
        raise NotImplementedError(limit)
    q, k, v, dout = _rows(q), _rows(k), _rows(v), _rows(dout)
    dlse = None if dlse is None else dlse.contiguous()
    if backend == "triton":
        from cogview_kernels.three_region_attention import triton_kernels

        regions = (pivots, block_size, window_blocks, pivot_bias, scale, dropout_p, seed)
        triton_kernels.launch_three_region_attention_bwd(dout, dlse, q, k, v, out, lse, *gradients, *regions)
        return gradients
    pivots = pivots.contiguous()
    sorted_pivots, workspace = None, (0, 0, 0)
    if backend == "cuda":
        q, k, v, out, dout = (_aligned(x) for x in (q, k, v, out, dout))
        sorted_pivots = _sorted_pivots(q, pivots, block_size, window_blocks)
        delta = torch.empty_like(lse)
        far = lse.new_empty(2, k.shape[0], k.shape[1], sorted_pivots.shape[1], k.shape[3])
        workspace = (delta.data_ptr(), far[0].data_ptr(), far[1].data_ptr())
        place = torch.cuda.current_stream().cuda_stream
        kernel = _extension.native.three_region_attention_bwd_cuda
    else:
        place = torch.get_num_threads()
        kernel = _extension.native.three_region_attention_bwd_cpu
    shared = _arguments(
        q, k, pivots, block_size, window_blocks, pivot_bias, scale, dropout_p, seed, sorted_pivots
    )
    kernel(
        tuple(_strided(x) for x in (q, k, v, out, dout)),
        lse.data_ptr(),
        0 if dlse is None else dlse.data_ptr(),
        tuple(_strided(x) for x in gradients),
        *shared,
        workspace,
        place,
    )
    return gradients


class ThreeRegionAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pivots, block_size, window_blocks, pivot_bias, scale, dropout_p, seed, backend):
        options = (block_size, window_blocks, pivot_bias, scale, dropout_p)
        out, lse = _library.eager(_OP, q, k, v, pivots, *options, seed, backend)
        ctx.save_for_backward(q, k, v, out, lse, pivots, seed)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, pivots, seed = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        gradients = _library.eager(
            f"{_OP}_backward", dout, dlse, q, k, v, out, lse, pivots, *ctx.options, seed, ctx.backend
        )
        return *gradients, *(None,) * 8


def three_region_attention_op(q: Tensor, k: Tensor, v: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """By the shortest way to the kernel that differentiates where it must and can be traced."""
    if torch.compiler.is_compiling():
        return torch.ops.cogview_kernels.three_region_attention(q, k, v, *arguments)
    if (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled():
        return ThreeRegionAttention.apply(q, k, v, *arguments)
    return _library.eager(_OP, q, k, v, *arguments)


_library.implement(_OP, _forward, ThreeRegionAttention)
_library.implement(f"{_OP}_backward", _backward)


@torch.library.register_fake(f"cogview_kernels::{_OP}")
def _forward_fake(q, *arguments):
    return _empty_outputs(q)


@torch.library.register_fake(f"cogview_kernels::{_OP}_backward")
def _backward_fake(dout, dlse, q, k, v, *arguments):
    return _empty_in_order_of(q), _empty_in_order_of(k), _empty_in_order_of(v)
