# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.decode_step``: schema and fake tensor. The op writes into the cache and has no
derivative."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from cogview_kernels import _flops
from cogview_kernels._attention import with_rows
from cogview_kernels._norms.rows import NormOptions
from cogview_kernels._torch_ops import Op
from cogview_kernels.decode_step import native
from cogview_kernels.layout import ThreeRegionLayout


def backend_module(backend: str) -> ModuleType:
    """The module whose ``forward`` and ``limit`` serve ``backend``."""
    return native


def _empty_output(x: Tensor, tensors: Sequence[Tensor], head: Tensor | None, *_: object) -> Tensor:
    if head is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty(x.shape[0], x.shape[1], head.shape[0])


def _forward(
    x: Tensor,
    tensors: Sequence[Tensor],
    head: Tensor | None,
    cache: Tensor,
    lengths: Tensor,
    pivots: Tensor | None,
    block_size: int,
    window_blocks: int,
    pivot_bias: float,
    density: int,
    eps: float,
    pb_relax: str | None,
    backend: str,
) -> Tensor:
    out = _empty_output(x, tensors, head)
    if x.numel() > 0:
        layout = None
        if pivots is not None:
            pivots = pivots.contiguous()
            layout = ThreeRegionLayout.unchecked(pivots, block_size, window_blocks, pivot_bias, density)
        head = None if head is None else with_rows(head)
        inputs = x.contiguous(), tensors, head, cache, lengths.contiguous(), layout
        backend_module(backend).forward(*inputs, NormOptions(eps, pb_relax), out, backend)
    return out


def _flops_of(of, _):
    x, cache, tensors = of["x"], of["cache"], of["tensors"]
    B, T, C = x.shape
    lengths = _flops.values(of["lengths"]) or [cache.shape[4] - T] * B
    pivots = None if of["pivots"] is None else (_flops.values(of["pivots"]) or [None] * B)
    pairs = 0
    for b, length in enumerate(lengths):
        if pivots is None:
            pairs += T * length + T * (T + 1) // 2
            continue
        layout = ThreeRegionLayout.unchecked(
            of["pivots"][b : b + 1], of["block_size"], of["window_blocks"], of["pivot_bias"], of["density"]
        )
        given = None if pivots[b] is None else [pivots[b]]
        # What earlier queries see does not change.
        pairs += layout.pairs(length + T, given) - layout.pairs(length, given)
    matrices = [tensor for tensor in (*tensors, of["head"]) if tensor is not None and tensor.dim() == 2]
    products = sum(matrix.numel() for matrix in matrices)
    return 2 * B * T * products + 4 * pairs * C * cache.shape[0]


decode_step_op = Op(
    "decode_step(Tensor x, Tensor[] tensors, Tensor? head, Tensor(a!) cache, Tensor lengths, Tensor? pivots, "
    "int block_size, int window_blocks, float pivot_bias, SymInt density, float eps, str? pb_relax, "
    "str backend) -> Tensor",
    kernel=_forward,
    fake=_empty_output,
    flops=_flops_of,
    prepare=native.prepare,
)
