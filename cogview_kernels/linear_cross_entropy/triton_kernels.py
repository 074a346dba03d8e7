# SPDX-License-Identifier: Apache-2.0
"""The triton backend: the steps of ``pieces`` on NVIDIA GPUs.

Letters: N tokens, C width, V ids in the softmax (v in a piece of it). Logits lie ``[v, n]``, a row per id.
Bytes: the logits are read once to be reduced, read and written once for their gradient.

``_merge_kernel`` ends the reduction of a piece: its ids are split so that all multiprocessors have work, and
the partial results are put together in one order, so two runs give the same bits.

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
from cogview_kernels._triton import LN2, LOG2E, offset, store_rounded
from cogview_kernels.linear_cross_entropy import pieces
from cogview_kernels.linear_cross_entropy.objective import Objective
from cogview_kernels.linear_cross_entropy.pieces import Piece, Tokens


@triton.jit
def _tanh(x):
    """Cephes' tanhf: a polynomial near 0, where 1 - exp(-2x) would cancel."""
    size, z = tl.abs(x), x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    e = tl.exp2(size * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(size < 0.625, p * z * x + x, tl.where(x < 0.0, -far, far))


@triton.jit
def _seen(x, bias_ptr, ids, v, softcap, CAPPED: tl.constexpr):
    """What the softmax sees of products ``[ids, tokens]``: the bias is added, then they are capped."""
    if bias_ptr is not None:
        x += tl.load(bias_ptr + ids, mask=ids < v, other=0.0)[:, None]
    if CAPPED:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit
def _without_infinity(logit_max):
    """-inf is the largest of no id; -inf minus -inf would be NaN."""
    return tl.where(logit_max == float("-inf"), 0.0, logit_max)


@triton.jit
def _load_target(target_ptr, cols, n):
    """The targets in 32 bits, half the registers: a vocabulary fits in them. -1 for what does not."""
    target = tl.load(target_ptr + cols, mask=cols < n, other=-1)
    return tl.where((target >= 0) & (target < 2147483647), target, -1).to(tl.int32)


@triton.jit
def _reduce_kernel(
    logits_ptr, bias_ptr, target_ptr, partial_ptr, sum_ptr, predicted_ptr,
    v, n, stride_v, splits, first, rows_per_split, softcap,
    CAPPED: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[:, split] = max, sum of exp(logit - max), and the target's logit, over the split's ids; also
    sum[split] = sum of logit - max, and predicted[split] = the first id of the largest, where wanted."""
    split = tl.program_id(0) % splits
    cols = tl.program_id(0) // splits * BLOCK_N + tl.arange(0, BLOCK_N)
    target = _load_target(target_ptr, cols, n) - first
    logit_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    below_max = tl.zeros([BLOCK_N], tl.float32)
    begin = split * rows_per_split
    predicted = tl.zeros([BLOCK_N], tl.int32) + begin
    stop = tl.minimum(v, begin + rows_per_split)
    for start in range(begin, stop, BLOCK_V):
        ids = start + tl.arange(0, BLOCK_V)
        inside = (ids < stop)[:, None] & (cols < n)[None, :]
        at = logits_ptr + offset(ids, stride_v)[:, None] + cols[None, :]
        if bias_ptr is not None or CAPPED:
            x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, _seen(x, bias_ptr, ids, v, softcap, CAPPED), float("-inf"))
        else:
            x = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        tile_max = tl.max(x, axis=0)
        if predicted_ptr is not None:
            id = tl.min(tl.where(x == tile_max[None, :], ids[:, None], 2147483647), axis=0)
            predicted = tl.where(tile_max > logit_max, id, predicted)
        new_max = tl.maximum(logit_max, tile_max)
        safe = _without_infinity(new_max)
        if sum_ptr is not None:
            if start > begin:
                below_max += (start - begin) * (logit_max - safe)
            below_max += tl.sum(tl.where(inside, x - safe[None, :], 0.0), axis=0)
        e = tl.exp2((x - safe[None, :]) * LOG2E)
        total = total * tl.exp2((logit_max - safe) * LOG2E) + tl.sum(e, axis=0)
        logit_max = new_max
    mine = (target >= begin) & (target < stop) & (cols < n)
    picked = tl.load(logits_ptr + offset(target, stride_v) + cols, mask=mine, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        picked += tl.load(bias_ptr + target, mask=mine, other=0.0)
    if CAPPED:
        picked = softcap * _tanh(picked / softcap)
    seen = cols < n
    tl.store(partial_ptr + offset(split, n) + cols, logit_max, mask=seen)
    tl.store(partial_ptr + offset(splits + split, n) + cols, total, mask=seen)
    tl.store(partial_ptr + offset(2 * splits + split, n) + cols, tl.where(mine, picked, 0.0), mask=seen)
    if sum_ptr is not None:
        tl.store(sum_ptr + offset(split, n) + cols, below_max, mask=seen)
    if predicted_ptr is not None:
        tl.store(predicted_ptr + offset(split, n) + cols, first + predicted, mask=seen)


@triton.jit
def _merge_kernel(
    partial_ptr, sum_ptr, predicted_ptr, target_ptr, stats_ptr, predicted_out_ptr,
    v, n, splits, first, rows_per_split, stride_stats,
    FIRST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """stats = the largest of the maxima, the totals brought to it and added, and the picked logit (-inf where
    the target is no id so far), of the splits and, but for the FIRST piece, of the ids before them."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    inside = (s < splits)[:, None] & (cols < n)[None, :]
    at = offset(s, n)[:, None] + cols[None, :]
    maxima = tl.load(partial_ptr + at, mask=inside, other=float("-inf"))
    totals = tl.load(partial_ptr + offset(splits + s, n)[:, None] + cols[None, :], mask=inside, other=0.0)
    logits = tl.load(partial_ptr + offset(2 * splits + s, n)[:, None] + cols[None, :], mask=inside, other=0.0)
    picked = tl.sum(logits, axis=0)
    logit_max = tl.max(maxima, axis=0)
    out_ptr, seen = stats_ptr + cols, cols < n
    # Added twice, and thrice: the multiple of a stride may not fit in 32 bits.
    total_ptr = out_ptr + stride_stats
    picked_ptr = total_ptr + stride_stats
    known_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    if not FIRST:
        known_max = tl.load(out_ptr, mask=seen, other=float("-inf"))
    piece_max, logit_max = logit_max, tl.maximum(logit_max, known_max)
    safe = _without_infinity(logit_max)
    total = tl.sum(totals * tl.exp2((maxima - safe[None, :]) * LOG2E), axis=0)
    row = _load_target(target_ptr, cols, n) - first
    here = (row >= 0) & (row < v)
    known_picked = tl.full([BLOCK_N], float("-inf"), tl.float32)
    if not FIRST:
        known_total = tl.load(total_ptr, mask=seen, other=0.0)
        total += known_total * tl.exp2((known_max - safe) * LOG2E)
        known_picked = tl.load(picked_ptr, mask=seen, other=0.0)
    tl.store(out_ptr, logit_max, mask=seen)
    tl.store(total_ptr, total, mask=seen)
    tl.store(picked_ptr, tl.where(here, picked, known_picked), mask=seen)
    if sum_ptr is not None:
        sums = tl.load(sum_ptr + at, mask=inside, other=0.0)
        ids = tl.minimum(rows_per_split, v - s * rows_per_split)
        sums += ids[:, None] * tl.where(inside, maxima - safe[None, :], 0.0)
        below_max = tl.sum(sums, axis=0)
        below_max_ptr = picked_ptr + stride_stats
        if not FIRST:
            below_max += tl.load(below_max_ptr, mask=seen, other=0.0) + first * (known_max - safe)
        tl.store(below_max_ptr, below_max, mask=seen)
    if predicted_ptr is not None:
        ids = tl.load(predicted_ptr + at, mask=inside, other=2147483647)
        id = tl.min(tl.where(maxima == piece_max[None, :], ids, 2147483647), axis=0).to(tl.int64)
        if not FIRST:
            id = tl.where(piece_max > known_max, id, tl.load(predicted_out_ptr + cols, mask=seen, other=0))
        tl.store(predicted_out_ptr + cols, id, mask=seen)


@triton.jit
def _gradient_kernel(
    logits_ptr, bias_ptr, target_ptr, coefficient_ptr, stats_ptr, dbias_ptr,
    v, n, first, stride_v, stride_stats, softcap, z_loss, id_share, target_share,
    CAPPED: tl.constexpr, Z_LOSS: tl.constexpr, SMOOTHED: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """logits = coefficient * (softmax * (1 + 2 z_loss lse) - target_share * onehot(target) - id_share) times
    the derivative of the cap, in place, exactly 0 where coefficient is. dbias[block of tokens] = their sums
    over the block."""
    id_blocks = tl.cdiv(v, BLOCK_V)
    token_block = tl.program_id(0) // id_blocks
    ids = tl.program_id(0) % id_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    cols = token_block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (ids < v)[:, None] & (cols < n)[None, :]
    at = logits_ptr + offset(ids, stride_v)[:, None] + cols[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    x = _seen(x, bias_ptr, ids, v, softcap, CAPPED)
    seen = cols < n
    target = _load_target(target_ptr, cols, n)
    coefficient = tl.load(coefficient_ptr + cols, mask=seen, other=0.0)
    logit_max = tl.load(stats_ptr + cols, mask=seen, other=0.0)
    total = tl.load(stats_ptr + stride_stats + cols, mask=seen, other=1.0)
    factor, at_target = coefficient / total, coefficient
    if Z_LOSS:
        factor *= 1.0 + 2.0 * z_loss * (logit_max + tl.log2(total) * LN2)
    p = tl.exp2((x - logit_max[None, :]) * LOG2E) * factor[None, :]
    if SMOOTHED:
        p -= (coefficient * id_share)[None, :]
        at_target = coefficient * target_share
    g = tl.where((first + ids)[:, None] == target[None, :], p - at_target[None, :], p)
    if CAPPED:
        t = x / softcap
        g *= 1.0 - t * t
    # A product would not do: the logits of a token that does not count may be infinite.
    g = tl.where((coefficient == 0.0)[None, :], 0.0, g)
    store_rounded(at, g, inside, logits_ptr.dtype.element_ty)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offset(token_block, v) + ids, tl.sum(g, axis=1), mask=ids < v)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """x *= factor. Bytes: 2 size elements, or none where the factor is 1, as most often."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        at = offset(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        store_rounded(x_ptr + at, x * factor, at < size, x_ptr.dtype.element_ty)


# ---- launchers. A grid has one dimension: a GPU takes 65,535 programs along the others, of 128 tokens 8.4 M.

# 128 tokens are 256 contiguous bytes in 16 bits. The threads of a reduction meet once a tile, so that its
# tiles are taller.
_REDUCE = {"BLOCK_V": 64, "BLOCK_N": 128, "num_warps": 4}
_GRADIENT = {"BLOCK_V": 32, "BLOCK_N": 128, "num_warps": 4}


def _splits(v: int, column_blocks: int, block_v: int, device: torch.device) -> tuple[int, int]:
    """Parts of the ids and the rows of each: whole tiles, about four programs a multiprocessor."""
    programs = 4 * _device.multiprocessors(device)
    tiles = triton.cdiv(v, block_v)
    splits = max(1, min(tiles, 64, programs // column_blocks))
    rows = triton.cdiv(tiles, splits) * block_v
    return triton.cdiv(v, rows), rows


def limit(backend: str, hidden: Tensor) -> str:
    """Why the steps cannot take ``hidden``; empty when they can."""
    return _checks.kernel_dtype_limit(backend, "hidden", hidden) or _checks.triton_rows_limit(
        "hidden", hidden
    )


def reduce(piece: Piece, tokens: Tokens, objective: Objective) -> None:
    """See :class:`pieces.Steps`."""
    logits, target, stats = piece.logits, tokens.target, tokens.stats
    v, n = logits.shape
    blocks = triton.cdiv(n, _REDUCE["BLOCK_N"])
    splits, rows = _splits(v, blocks, _REDUCE["BLOCK_V"], logits.device)
    partial = stats.new_empty(3, splits, n)
    sums = stats.new_empty(splits, n) if objective.label_smoothing else None
    predicted = None
    if tokens.predicted is not None:
        predicted = target.new_empty(splits, n, dtype=torch.int32)
    _reduce_kernel[(splits * blocks,)](
        logits, piece.bias, target, partial, sums, predicted,
        v, n, logits.stride(0), splits, piece.first, rows, objective.softcap,
        CAPPED=objective.softcap > 0, **_REDUCE,
    )  # fmt: skip
    block_s = triton.next_power_of_2(splits)
    block_n = max(16, 2048 // block_s)
    _merge_kernel[(triton.cdiv(n, block_n),)](
        partial, sums, predicted, target, stats, tokens.predicted,
        v, n, splits, piece.first, rows, stats.stride(0),
        FIRST=piece.first == 0, BLOCK_S=block_s, BLOCK_N=block_n,
    )  # fmt: skip


def gradient(piece: Piece, tokens: Tokens, objective: Objective, dbias: Tensor | None) -> None:
    """See :class:`pieces.Steps`."""
    logits, smoothing = piece.logits, objective.label_smoothing
    v, n = logits.shape
    token_blocks = triton.cdiv(n, _GRADIENT["BLOCK_N"])
    sums = None if dbias is None else dbias.new_empty(token_blocks, v)
    _gradient_kernel[(triton.cdiv(v, _GRADIENT["BLOCK_V"]) * token_blocks,)](
        logits, piece.bias, tokens.target, tokens.coefficient, tokens.stats, sums,
        v, n, piece.first, logits.stride(0), tokens.stats.stride(0),
        objective.softcap, objective.z_loss, smoothing / piece.ids, 1 - smoothing,
        CAPPED=objective.softcap > 0, Z_LOSS=objective.z_loss > 0, SMOOTHED=smoothing > 0, **_GRADIENT,
    )  # fmt: skip
    if dbias is not None and sums is not None:
        dbias += sums.sum(0)


def scale(gradient: Tensor, factor: Tensor) -> None:
    """See :class:`pieces.Steps`; ``gradient`` is contiguous, and nobody waits to know the factor."""
    if size := gradient.numel():
        _scale_kernel[(triton.cdiv(size, 4096),)](gradient, factor, size, BLOCK=4096)


product, adder = pieces.product, pieces.no_adder
