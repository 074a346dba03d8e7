# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.decode_attention``: schema and fake tensor. The op has no derivative."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cogview_kernels import _flops
from cogview_kernels._attention import with_rows
from cogview_kernels._torch_ops import Op
from cogview_kernels.decode_attention import native
from cogview_kernels.layout import ThreeRegionLayout, window_start


def backend_module(backend: str) -> ModuleType:
    """The module whose ``forward`` and ``limit`` serve ``backend``."""
    if backend == "triton":
        from cogview_kernels.decode_attention import triton_kernels

        return triton_kernels
    return native


def _forward(
    q, k_cache, v_cache, lengths, pivots, block_size, window_blocks, pivot_bias, density, starts,
    scale, backend,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() > 0:
        layout = None
        if pivots is not None:
            pivots = pivots.contiguous()
            layout = ThreeRegionLayout.unchecked(pivots, block_size, window_blocks, pivot_bias, density)
        starts = None if starts is None else starts.contiguous()
        inputs = with_rows(q), with_rows(k_cache), with_rows(v_cache), lengths.contiguous()
        backend_module(backend).forward(*inputs, layout, starts, scale, out, backend)
    return out


def _empty_output(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _flops_of(of, _):
    q, S = of["q"], of["k_cache"].shape[2]
    B, H, Tq, D = q.shape
    lengths = _flops.values(of["lengths"]) or [S] * B
    pivots = None if of["pivots"] is None else (_flops.values(of["pivots"]) or [[]] * B)
    starts = [0] * B if of["starts"] is None else (_flops.values(of["starts"]) or [0] * B)
    pairs = 0
    for b, length in enumerate(lengths):
        origin = max(0, starts[b])
        for query in range(max(origin, length - Tq), length):
            start = origin
            if pivots is not None:
                start = max(origin, window_start(query, of["block_size"], of["window_blocks"], origin))
                pairs += sum(origin <= pivot < start for pivot in pivots[b])
            pairs += query + 1 - start
    return 4 * pairs * H * D


decode_attention_op = Op(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? pivots, "
    "int block_size, int window_blocks, float pivot_bias, SymInt density, Tensor? starts, float scale, "
    "str backend) -> Tensor",
    kernel=_forward,
    fake=_empty_output,
    flops=_flops_of,
    prepare=native.prepare,
)
