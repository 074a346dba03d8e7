# SPDX-License-Identifier: Apache-2.0
"""Three-region attention on NVIDIA GPUs from compute capability 8.0: how it works, and what a call launches.

Letters: B samples, H query heads, G query heads a key head, T positions, D head size (BLOCK_D the power of
two it is padded to), P pivots a sample, NB = ceil(T / block_size) blocks of the layout; tiles have BLOCK_M
queries and BLOCK_N keys. TP and PP are T and P rounded up to whole tiles: loads of what has as many entries
need no mask, which in a loop costs more than the load.

Pivots are sorted first. Those left of a query's window are then a prefix of the list, so a tile of queries
walks two loops under one softmax: the prefix, then the window. Every tile is full but those at the end of the
prefix and on the diagonal (and, where block_size is no multiple of BLOCK_M, at the start of the window); a
tile that is not full takes a branch that masks it. Key j counts for the queries from first(j) up to end(j),
so a tile of keys walks one loop over queries with a mask at its ends alone.

Keys and values of pivots are gathered where they are used: a row of D elements fills whole sectors of
memory, the loop loads positions one stage ahead of rows, and no packed copy is made. Their gradients are
written packed, each by one program, and added by the rank of a pivot to those of the window: no atomics.

Scores are in units of log2, s = q.k * factor + bias, with factor = scale * log2(e) and bias = pivot_bias *
log2(e) or 0: 2^s costs one multiply-add and one ex2 an element.

FLOPs: with N visible (query, key) pairs of all heads, forward 4 N D (two products), backward 14 N D (seven:
scores and dprobs twice). Bytes, forward: q and out once, k and v of a tile's window and prefix by each tile
of queries, out of the L2 cache for the most part.

Where the layout is not causal, far keys are a prefix and a suffix of the list, walked as one row. Where
samples start apart, behind padding, ``origin`` is a sample's first position: blocks are counted from there,
and pivots before it are none.

The kernels are in ``index_triton``, ``forward_triton`` and ``backward_triton``. On compute capability 9.0 a
compiled forward stands in for that of Triton in the calls that ``forward_hopper`` takes; index and backward
are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cogview_kernels._attention_triton import log2_factor
from cogview_kernels._dropout import Dropout
from cogview_kernels._triton import LOG2E, Launch, Plans, dropout_arguments, precision
from cogview_kernels.layout import ThreeRegionLayout
from cogview_kernels.three_region_attention import forward_hopper, launch_config, native
from cogview_kernels.three_region_attention.backward_triton import (
    bwd_rows_kernel,
    dkv_far_kernel,
    dkv_kernel,
    dq_kernel,
)
from cogview_kernels.three_region_attention.forward_triton import fwd_kernel
from cogview_kernels.three_region_attention.index_triton import index_kernel
from cogview_kernels.three_region_attention.launch_config import Config

# Queries or keys of a tile, at most.
_LARGEST_TILE = 128


def _whole_tiles(n: int) -> int:
    return (n + _LARGEST_TILE - 1) // _LARGEST_TILE * _LARGEST_TILE


class _Call(NamedTuple):
    """What both directions are given; scale is not negative."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: ThreeRegionLayout
    starts: Tensor | None
    scale: float
    dropout: Dropout | None

    def key(self) -> tuple[Any, ...]:
        """All that a plan looks at."""
        q, k, v, layout, starts, scale, dropout = self
        pivots = layout.pivots
        return (
            q.dtype, q.get_device(), q.shape, k.shape, q.stride(), k.stride(), v.stride(), scale,
            pivots.shape, pivots.dtype, layout.block_size, layout.window_blocks, layout.pivot_bias,
            layout.causal, None if starts is None else starts.dtype,
            dropout and dropout.keep_threshold, precision(q), launch_config.choose,
        )  # fmt: skip


class _Sizes:
    """What both directions work out from shapes and layout. ``stride_i``: integers of a sample's index."""

    def __init__(self, q: Tensor, k: Tensor, layout: ThreeRegionLayout) -> None:
        self.B, self.H, self.T, self.D = q.shape
        self.heads = k.shape[1]
        self.G = self.H // self.heads
        self.P = layout.pivots.shape[1]
        # Block size and window blocks as short as makes no difference at T positions.
        self.block_size = min(layout.block_size, self.T)
        self.blocks = triton.cdiv(self.T, self.block_size)
        self.window_blocks = min(layout.window_blocks, self.blocks)
        self.TP, self.PP = _whole_tiles(self.T), _whole_tiles(self.P)
        self.stride_i = _stride_of_index(self.T, self.P, layout.block_size, layout.window_blocks)
        self.has_far = self.stride_i > 0
        self.peaks_at = self.B * self.stride_i


def _stride_of_index(T: int, P: int, block_size: int, window_blocks: int) -> int:
    """Integers of a sample in :func:`index_kernel`, whole multiples of 64 bytes, so that nothing starts in
    the middle of a vector; 0 where no key is far."""
    if P == 0 or block_size * window_blocks >= T:
        return 0
    return (_whole_tiles(P) + T + (T - 1) // block_size + 17) // 16 * 16


def residuals_size(q: Tensor, pivots: Tensor, block_size: int, window_blocks: int) -> int:
    """How many int32 the forward leaves for the backward besides out and lse: the index of the pivots, see
    :func:`index_kernel`, then the bits of both peaks of each row, see :func:`fwd_kernel`."""
    B, H, T, _ = q.shape
    return B * (_stride_of_index(T, pivots.shape[1], block_size, window_blocks) + 2 * H * T)


def _tiles(config: Config) -> dict[str, int | None]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "STAGES": config.stages,
        "maxnreg": config.maxnreg,
    }


def _flags(call: _Call) -> dict[str, Any]:
    q, dropout = call.q, call.dropout
    return {
        "HAS_STARTS": call.starts is not None,
        "CAUSAL": call.layout.causal,
        "HAS_DROPOUT": dropout is not None,
        "PRECISION": precision(q),
        "D": q.shape[3],
        "BLOCK_D": launch_config.padded(q.shape[3]),
    }


def _chosen(
    kernel: str, call: _Call, launch: Callable[[Config], Launch], arguments: Callable[[Launch], None]
) -> Launch:
    """``launch`` at the configuration that suits; ``arguments`` runs one, should it have to be timed."""
    made: dict[Config, Launch] = {}

    def run(config: Config) -> None:
        if config not in made:
            made[config] = launch(config)
        arguments(made[config])

    q, block_size = call.q, min(call.layout.block_size, call.q.shape[2])
    dropped = call.dropout is not None
    return launch(launch_config.choose(kernel, q.device, q.shape[3], q.dtype, block_size, dropped, run))


def limit(backend: str, q: Tensor) -> str:
    """Why the kernels cannot take ``q``, and the way out; empty when they can."""
    return native.limit(backend, q)


def _index_launch(sizes: _Sizes, has_starts: bool) -> Launch:
    numbers = (sizes.P, sizes.PP, sizes.T, sizes.stride_i, sizes.block_size)
    return Launch(index_kernel, (sizes.B,), numbers, HAS_STARTS=has_starts, BLOCK=1024, num_warps=8)


class _Forward(NamedTuple):
    sort: Launch | None
    fwd: Callable[..., None]


def _plan_forward(call: _Call, out: Tensor, lse: Tensor, residuals: Tensor) -> _Forward:
    q, k, v, layout, starts, scale, dropout = call
    sizes = _Sizes(q, k, layout)
    seed, keep_threshold, keep_scale = dropout_arguments(dropout)
    origins = residuals if starts is None else starts
    sort = _index_launch(sizes, starts is not None) if sizes.has_far else None
    if sort is not None:  # tuning launches the kernel on what it leaves
        sort(layout.pivots.contiguous(), origins, residuals)
    if forward_hopper.takes((q, k, v, out), layout, starts, dropout):
        index = (sizes.PP, sizes.stride_i, sizes.block_size, sizes.window_blocks)
        return _Forward(
            sort, forward_hopper.launch(index, log2_factor(scale), layout.pivot_bias * LOG2E.value)
        )

    def fwd(config: Config) -> Launch:
        numbers = (
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            sizes.H, sizes.G, sizes.T, sizes.PP, sizes.stride_i, sizes.peaks_at,
            sizes.block_size, sizes.window_blocks,
            log2_factor(scale), layout.pivot_bias * LOG2E.value, keep_threshold, keep_scale,
        )  # fmt: skip
        grid = (triton.cdiv(sizes.T, config.block_m) * sizes.B * sizes.H,)
        return Launch(fwd_kernel, grid, numbers, HAS_FAR=sizes.has_far, **_flags(call), **_tiles(config))

    tensors = (q, k, v, origins, residuals, out, lse)
    return _Forward(sort, _chosen("fwd", call, fwd, lambda launch: launch(*tensors, seed=seed)))


_forward_plans: Plans[_Forward] = Plans(_plan_forward)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    starts: Tensor | None,
    scale: float,
    dropout: Dropout | None,
    results: tuple[Tensor, Tensor, Tensor],
    _: str,
) -> None:
    """Fills ``results``: out, lse and residuals. Rows are contiguous, ``starts`` throughout.

    Two launches; one if no key is far."""
    out, lse, residuals = results
    if scale < 0:
        q, scale = -q, -scale
    origins = residuals if starts is None else starts  # what is not read is any tensor
    call = _Call(q, k, v, layout, starts, scale, dropout)
    is_aligned = forward_hopper.is_aligned(q, k, v, out)
    plan = _forward_plans.get((call.key(), out.stride(), is_aligned), call, out, lse, residuals)
    if plan.sort is not None:
        plan.sort(layout.pivots.contiguous(), origins, residuals)
    plan.fwd(q, k, v, origins, residuals, out, lse, seed=dropout_arguments(dropout)[0])


class _Backward(NamedTuple):
    """The launches, the shapes of what they share (:func:`bwd_rows_kernel`) and of the far gradients."""

    rows: Launch
    dq: Launch | None
    dkv_far: Launch | None
    dkv: Launch | None
    stats_shape: tuple[int, ...]
    words_shape: tuple[int, ...]
    far_shape: tuple[int, ...]


def _plan_backward(
    call: _Call,
    dq_scale: float,
    saved: tuple[Tensor, Tensor, Tensor],
    doutputs: tuple[Tensor, Tensor | None],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> _Backward:
    q, k, v, layout, starts, scale, dropout = call
    (out, lse, residuals), (dout, dlse), (dq, dk, dv) = saved, doutputs, gradients
    sizes = _Sizes(q, k, layout)
    B, H, T, D = q.shape
    seed, keep_threshold, keep_scale = dropout_arguments(dropout)
    factor, bias = log2_factor(scale), layout.pivot_bias * LOG2E.value
    flags = _flags(call) | {"TWO_PEAKS": q.dtype != torch.bfloat16}
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    common = (sizes.H, sizes.G, T, sizes.TP, sizes.PP, sizes.stride_i, sizes.block_size, sizes.window_blocks)

    block = 64
    rows = Launch(
        bwd_rows_kernel,
        (sizes.TP // block * B * H,),
        (*out.stride()[:3], *dout.stride()[:3], H, T, sizes.TP, sizes.peaks_at),
        TWO_PEAKS=flags["TWO_PEAKS"], HAS_DLSE=dlse is not None, HAS_DROPOUT=dropout is not None,
        D=D, BLOCK_D=flags["BLOCK_D"], BLOCK_M=block,
    )  # fmt: skip

    def dq_launch(config: Config) -> Launch:
        assert dq is not None
        numbers = (*inputs, *dq.stride()[:3], *common, dq_scale, factor, bias, keep_threshold, keep_scale)
        grid = (triton.cdiv(T, config.block_m) * B * H,)
        return Launch(dq_kernel, grid, numbers, HAS_FAR=sizes.has_far, **flags, **_tiles(config))

    def dkv_far_launch(config: Config) -> Launch:
        numbers = (*inputs, *common, scale, factor, bias, keep_threshold, keep_scale)
        grid = (sizes.PP // config.block_n * B * sizes.heads,)
        return Launch(dkv_far_kernel, grid, numbers, **flags, **_tiles(config))

    def dkv_launch(config: Config) -> Launch:
        assert dk is not None and dv is not None
        numbers = (
            *inputs, *dk.stride()[:3], *dv.stride()[:3], *common, scale, factor, keep_threshold, keep_scale
        )  # fmt: skip
        grid = (triton.cdiv(T, config.block_n) * B * sizes.heads,)
        return Launch(dkv_kernel, grid, numbers, HAS_FAR=sizes.has_far, **flags, **_tiles(config))

    stats_shape, words_shape, far_shape = (
        (B, H, 3, sizes.TP),
        (B, H, 2, sizes.TP),
        (2, B, sizes.heads, sizes.PP, D),
    )
    # What tuning launches the kernels on.
    stats, words = _empty_stats(lse, stats_shape, words_shape, dropout)
    far = k.new_empty(far_shape if sizes.has_far and dk is not None else (2, 0))
    rows(out, dout, residuals, lse if dlse is None else dlse, stats, words, seed=seed)
    before = (q, k, v, dout, residuals if starts is None else starts, residuals, stats, words)
    return _Backward(
        rows,
        None if dq is None else _chosen("dq", call, dq_launch, lambda launch: launch(*before, dq)),
        None
        if dk is None or not sizes.has_far
        else _chosen("dkv_far", call, dkv_far_launch, lambda launch: launch(*before, *far)),
        None
        if dk is None
        else _chosen("dkv", call, dkv_launch, lambda launch: launch(*before, *far, dk, dv)),
        stats_shape,
        words_shape,
        tuple(far.shape),
    )


def _empty_stats(
    lse: Tensor, stats_shape: tuple[int, ...], words_shape: tuple[int, ...], dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    stats = lse.new_empty(stats_shape)
    return stats, stats if dropout is None else lse.new_empty(words_shape, dtype=torch.int32)


_backward_plans: Plans[_Backward] = Plans(_plan_backward)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    starts: Tensor | None,
    scale: float,
    dropout: Dropout | None,
    saved: tuple[Tensor, Tensor, Tensor],
    doutputs: tuple[Tensor, Tensor | None],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    _: str,
) -> None:
    """Fills ``gradients``, of q, k and v; None is not wanted. ``saved``: out, lse and residuals;
    ``doutputs``: of out and lse.

    Rows are contiguous, ``starts`` throughout. Four launches, three where no key is far, fewer where a
    gradient is not wanted."""
    (out, lse, residuals), (dout, dlse), (dq, *dkv) = saved, doutputs, gradients
    dk, dv = native.both_or_neither(k, v, *dkv)
    gradients = dq, dk, dv
    dq_scale = scale
    if scale < 0:
        # Scores stay what they were; dq belongs to -q, and its sign is turned back by dq_scale.
        q, scale = -q, -scale
    call = _Call(q, k, v, layout, starts, scale, dropout)
    strides = (out.stride(), dout.stride(), *(None if x is None else x.stride() for x in gradients))
    key = (call.key(), dq_scale, dlse is None, strides)
    plan = _backward_plans.get(key, call, dq_scale, saved, doutputs, gradients)
    stats, words = _empty_stats(lse, plan.stats_shape, plan.words_shape, dropout)
    dk_far, dv_far = k.new_empty(plan.far_shape).unbind()
    plan.rows(
        out, dout, residuals, lse if dlse is None else dlse, stats, words, seed=dropout_arguments(dropout)[0]
    )
    before = (q, k, v, dout, residuals if starts is None else starts, residuals, stats, words)
    if plan.dq is not None:
        plan.dq(*before, dq)
    if plan.dkv_far is not None:
        plan.dkv_far(*before, dk_far, dv_far)
    if plan.dkv is not None:
        plan.dkv(*before, dk_far, dv_far, dk, dv)
