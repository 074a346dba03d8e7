# SPDX-License-Identifier: Apache-2.0
"""The triton backend: the steps of ``pieces`` on NVIDIA GPUs.

Letters: N tokens, C width, V ids in the softmax (v in a piece of it). Logits lie ``[v, n]``, a row per id.
Bytes: the logits are read once to be reduced, read and written once for their gradient.

``_merge_kernel`` ends the reduction: the vocabulary is split so that all multiprocessors have work, and the
partial results are put together in one order, so two runs give the same bits.

No kernel makes its own logits, and none goes on from a tile of the gradient to ``dhidden`` and ``dweight``:
benchmarks/NOTES.md has the counts. PyTorch (cuBLAS) multiplies faster than a Triton kernel by more than the
logits' way through memory costs, and a tile's share of the gradients in float32 fits in no multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels import _checks, _device
from cogview_kernels._triton import LOG2E, offset, store_rounded


@triton.jit
def _online(x, logit_max, total):
    """The running ``max(x)`` and ``sum(exp(x - max))`` over ids."""
    new_max = tl.maximum(logit_max, tl.max(x, axis=0))
    # No id yet: -inf minus -inf would be NaN.
    safe = tl.where(new_max == float("-inf"), 0.0, new_max)
    e = tl.exp2((x - safe[None, :]) * LOG2E)
    total = total * tl.exp2((logit_max - safe) * LOG2E) + tl.sum(e, axis=0)
    return new_max, total


@triton.jit
def _load_target(target_ptr, cols, n):
    """The targets in 32 bits, half the registers: a vocabulary fits in them. -1 for what does not."""
    target = tl.load(target_ptr + cols, mask=cols < n, other=-1)
    return tl.where((target >= 0) & (target < 2147483647), target, -1).to(tl.int32)


@triton.jit
def _store_partial(partial_ptr, split, splits, cols, n, logit_max, total, picked):
    tl.store(partial_ptr + offset(split, n) + cols, logit_max, mask=cols < n)
    tl.store(partial_ptr + offset(splits + split, n) + cols, total, mask=cols < n)
    tl.store(partial_ptr + offset(2 * splits + split, n) + cols, picked, mask=cols < n)


@triton.jit
def _reduce_kernel(
    logits_ptr, target_ptr, partial_ptr, V, n, stride_v, rows_per_split,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[:, split] = max, sum of exp(logit - max), and the target's logit, over the split's ids."""
    split = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = _load_target(target_ptr, cols, n)
    logit_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    begin = split * rows_per_split
    stop = tl.minimum(V, begin + rows_per_split)
    for start in range(begin, stop, BLOCK_V):
        ids = start + tl.arange(0, BLOCK_V)
        inside = (ids < stop)[:, None] & (cols < n)[None, :]
        at = logits_ptr + offset(ids, stride_v)[:, None] + cols[None, :]
        x = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        logit_max, total = _online(x, logit_max, total)
    mine = (target >= begin) & (target < stop) & (cols < n)
    picked = tl.load(logits_ptr + offset(target, stride_v) + cols, mask=mine, other=0.0).to(tl.float32)
    _store_partial(partial_ptr, split, tl.num_programs(0), cols, n, logit_max, total, picked)


@triton.jit
def _merge_kernel(
    partial_ptr, target_ptr, stats_ptr, V, n, splits, stride_stats,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """stats = the largest of the splits' maxima, their totals brought to it and added, and the picked logit
    (-inf where the target is no id)."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    inside = (s < splits)[:, None] & (cols < n)[None, :]
    at = partial_ptr + cols[None, :]
    maxima = tl.load(at + offset(s, n)[:, None], mask=inside, other=float("-inf"))
    totals = tl.load(at + offset(splits + s, n)[:, None], mask=inside, other=0.0)
    picked = tl.sum(tl.load(at + offset(2 * splits + s, n)[:, None], mask=inside, other=0.0), axis=0)
    logit_max = tl.max(maxima, axis=0)
    safe = tl.where(logit_max == float("-inf"), 0.0, logit_max)
    total = tl.sum(totals * tl.exp2((maxima - safe[None, :]) * LOG2E), axis=0)
    target = _load_target(target_ptr, cols, n)
    picked = tl.where((target >= 0) & (target < V), picked, float("-inf"))
    out_ptr = stats_ptr + cols
    tl.store(out_ptr, logit_max, mask=cols < n)
    tl.store(out_ptr + stride_stats, total, mask=cols < n)
    # Added twice: the double of a stride may not fit in 32 bits.
    tl.store(out_ptr + stride_stats + stride_stats, picked, mask=cols < n)


@triton.jit
def _dlogits(x, ids, cols, n, first, target_ptr, coefficient_ptr, stats_ptr, stride_stats):
    """coefficient * (exp(x - logit_max) / total - (id == target)), exactly 0 where coefficient is."""
    seen = cols < n
    target = _load_target(target_ptr, cols, n)
    coefficient = tl.load(coefficient_ptr + cols, mask=seen, other=0.0)
    logit_max = tl.load(stats_ptr + cols, mask=seen, other=0.0)
    total = tl.load(stats_ptr + stride_stats + cols, mask=seen, other=1.0)
    p = tl.exp2((x - logit_max[None, :]) * LOG2E) * (coefficient / total)[None, :]
    g = tl.where((first + ids)[:, None] == target[None, :], p - coefficient[None, :], p)
    # A product would not do: the logits of a token that does not count may be infinite.
    return tl.where((coefficient == 0.0)[None, :], 0.0, g)


@triton.jit
def _gradient_kernel(
    logits_ptr, target_ptr, coefficient_ptr, stats_ptr, first, v, n, stride_v, stride_stats,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """logits = coefficient * (softmax(logits) - onehot(target)), in place."""
    ids = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (ids < v)[:, None] & (cols < n)[None, :]
    at = logits_ptr + offset(ids, stride_v)[:, None] + cols[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    g = _dlogits(x, ids, cols, n, first, target_ptr, coefficient_ptr, stats_ptr, stride_stats)
    store_rounded(at, g, inside, logits_ptr.dtype.element_ty)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """x *= factor. Bytes: 2 size elements, or none where the factor is 1, as most often."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        at = offset(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        store_rounded(x_ptr + at, x * factor, at < size, x_ptr.dtype.element_ty)


# ---- launchers

# 128 tokens are 256 contiguous bytes in 16 bits. The threads of a reduction meet once a tile, so that its
# tiles are taller.
_REDUCE = {"BLOCK_V": 64, "BLOCK_N": 128, "num_warps": 4}
_GRADIENT = {"BLOCK_V": 32, "BLOCK_N": 128, "num_warps": 4}


def _splits(V: int, column_blocks: int, block_v: int, device: torch.device) -> tuple[int, int]:
    """Parts of the vocabulary and the rows of each: whole tiles, about four programs a multiprocessor."""
    programs = 4 * _device.multiprocessors(device)
    tiles = triton.cdiv(V, block_v)
    splits = max(1, min(tiles, 64, programs // column_blocks))
    rows = triton.cdiv(tiles, splits) * block_v
    return triton.cdiv(V, rows), rows


def _merge(partial: Tensor, target: Tensor, stats: Tensor, V: int) -> None:
    _, splits, n = partial.shape
    block_s = triton.next_power_of_2(splits)
    block_n = max(16, 2048 // block_s)
    _merge_kernel[(triton.cdiv(n, block_n),)](
        partial, target, stats, V, n, splits, stats.stride(0), BLOCK_S=block_s, BLOCK_N=block_n
    )


def limit(backend: str, hidden: Tensor) -> str:
    """Why the steps cannot take ``hidden``; empty when they can."""
    return _checks.kernel_dtype_limit(backend, "hidden", hidden)


def reduce(logits: Tensor, target: Tensor, stats: Tensor) -> None:
    """See :class:`pieces.Steps`."""
    V, n = logits.shape
    blocks = triton.cdiv(n, _REDUCE["BLOCK_N"])
    splits, rows = _splits(V, blocks, _REDUCE["BLOCK_V"], logits.device)
    partial = stats.new_empty(3, splits, n)
    _reduce_kernel[(splits, blocks)](logits, target, partial, V, n, logits.stride(0), rows, **_REDUCE)
    _merge(partial, target, stats, V)


def gradient(logits: Tensor, first: int, target: Tensor, coefficient: Tensor, stats: Tensor) -> None:
    """See :class:`pieces.Steps`."""
    v, n = logits.shape
    grid = (triton.cdiv(v, _GRADIENT["BLOCK_V"]), triton.cdiv(n, _GRADIENT["BLOCK_N"]))
    _gradient_kernel[grid](
        logits, target, coefficient, stats, first, v, n, logits.stride(0), stats.stride(0), **_GRADIENT
    )


def scale(gradient: Tensor, factor: Tensor) -> None:
    """See :class:`pieces.Steps`; ``gradient`` is contiguous, and nobody waits to know the factor."""
    if size := gradient.numel():
        _scale_kernel[(triton.cdiv(size, 4096),)](gradient, factor, size, BLOCK=4096)
