# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.decode_attention``: registration and fake tensor. It has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _extension, _library

_OP = "decode_attention"
_library.define(
    f"{_OP}(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float scale, Tensor? pivots, "
    "int block_size, int window_blocks, float pivot_bias, str backend) -> Tensor"
)

# Keys of a thread block, and blocks that may share a query's keys. Both follow from shapes alone.
_CHUNK, _MOST_SPLITS = 256, 64


def kernel_limit(backend: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str:
    """Why a kernel cannot take these, and the way out; empty when it can."""
    if q.dtype not in _extension.DTYPE_CODES:
        return (
            f"{_OP}: the {backend} backend takes float32, float16 and bfloat16, got {q.dtype}; "
            "use backend='sdpa'"
        )
    multiple = 8 if backend == "cuda" else 1
    if q.shape[-1] % multiple or q.shape[-1] > 256:
        sizes = "multiples of 8 up to 256" if backend == "cuda" else "up to 256"
        return f"{_OP}: the {backend} backend takes head sizes {sizes}, got {q.shape[-1]}; use backend='sdpa'"
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
        return (
            f"{_OP}: the {backend} backend has no gradient; use backend='sdpa', or torch.no_grad() where "
            "none is needed"
        )
    return ""


def _aligned(x: Tensor) -> Tensor:
    """``x`` with every row at a multiple of eight elements, which is how the CUDA kernel reads."""
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    for size, stride in zip(x.shape[:3], x.stride(), strict=False):
        fits = fits and (size == 1 or stride % 8 == 0)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _decode(q, k_cache, v_cache, lengths, scale, pivots, block_size, window_blocks, pivot_bias, backend):
    if limit := kernel_limit(backend, q, k_cache, v_cache):
        raise NotImplementedError(limit)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    lengths = lengths.contiguous()
    if pivots is not None:
        pivots = pivots.contiguous()
    if backend == "cuda":
        q, k_cache, v_cache = _aligned(q), _aligned(k_cache), _aligned(v_cache)
    else:
        q, k_cache, v_cache = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache))
    if backend == "triton":
        from cogview_kernels.decode_attention.triton_kernels import launch_decode_attention

        regions = pivots, block_size, window_blocks, pivot_bias
        launch_decode_attention(q, k_cache, v_cache, lengths, out, scale, *regions)
        return out
    B, H, Tq, D = q.shape
    Hkv, S = k_cache.shape[1:3]
    layout, keys = ((0, 8), 0, S, 1, 0.0), S
    if pivots is not None:
        w, W = min(block_size, S), min(window_blocks, S)
        listed = (pivots.data_ptr(), pivots.element_size())
        layout, keys = (listed, pivots.shape[1], w, W, pivot_bias), pivots.shape[1] + min(S, w * W + Tq)

    def run(kernel, splits, place):
        kernel(
            *((x.data_ptr(), x.stride()[:3]) for x in (q, k_cache, v_cache)),
            (lengths.data_ptr(), lengths.element_size()),
            (out.data_ptr(), out.stride()[:3]),
            (B, H, Hkv, Tq, S, D),
            layout,
            scale,
            _extension.DTYPE_CODES[q.dtype],
            splits,
            place,
        )

    if backend == "cpu":
        # It divides the keys by itself: the lengths are at hand.
        run(_extension.native.decode_attention_cpu, (0, 0, 0), torch.get_num_threads())
        return out
    splits = min(_MOST_SPLITS, -(-keys // _CHUNK))
    chunk = -(-keys // splits)
    partial = q.new_empty(B, H, Tq, splits if splits > 1 else 0, D + 2, dtype=torch.float32)
    stream = torch.cuda.current_stream().cuda_stream
    run(_extension.native.decode_attention_cuda, (chunk, splits, partial.data_ptr()), stream)
    return out


def decode_attention_op(*arguments) -> Tensor:
    """By the shortest way to the kernel that can be traced."""
    if torch.compiler.is_compiling():
        return torch.ops.cogview_kernels.decode_attention(*arguments)
    return _library.eager(_OP, *arguments)


_library.implement(_OP, _decode)


@torch.library.register_fake(f"cogview_kernels::{_OP}")
def _decode_fake(q, *arguments):
    return torch.empty_like(q, memory_format=torch.contiguous_format)
