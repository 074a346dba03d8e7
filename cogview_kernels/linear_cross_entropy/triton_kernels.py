# SPDX-License-Identifier: Apache-2.0
"""The steps of linear cross-entropy on NVIDIA GPUs, in two routes behind one set of arguments.

Letters: N tokens, C width, V ids in the softmax (v in a piece of it). Logits lie ``[v, n]``, a row per id.

- **products**: PyTorch multiplies (cuBLAS), ``_reduce_kernel`` and ``_gradient_kernel`` read the logits that
  lie in memory. Bytes: 1 read of the logits to reduce them, 1 read and 1 write for their gradient.
- **fused**: ``_fused_reduce_kernel`` and ``_fused_gradient_kernel`` multiply too, 2 C FLOPs a logit, and keep
  logits in registers, in float32. Nothing is stored to be reduced; the gradient is written once.
  Tiles of tokens that do not count are skipped.

Both end in ``_merge_kernel``: the vocabulary is split so that all multiprocessors have work, and the partial
results are put together in one order, so two runs give the same bits.

No kernel goes on from a tile of the gradient to ``dhidden`` and ``dweight``: a tile's share of them in
float32 (128 x 2,560 for ``dhidden``) fits in no multiprocessor. Its owner would make the logits again for
each slice of C that fits, C / 256 times over; sums in memory would need locks, or atomics in no fixed order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels._triton import INTERPRETED, LOG2E, offset, store_rounded

# Which steps make their own logits: the losses alone, and the logits of a gradient that are not held.
# Predicted, not yet measured: cuBLAS multiplies at about 790 TFLOP/s on an H200 and a Triton kernel at 600 to
# 650; passing logits through memory costs less than that difference (see benchmarks/NOTES.md).
FUSED = (False, False)


@triton.jit
def _online(x, peak, total, AXIS: tl.constexpr):
    """Running ``max(x)`` and ``sum(exp(x - max))`` along AXIS."""
    new_peak = tl.maximum(peak, tl.max(x, axis=AXIS))
    # No id yet: -inf minus -inf would be NaN.
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    e = tl.exp2((x - tl.expand_dims(safe, AXIS)) * LOG2E)
    total = total * tl.exp2((peak - safe) * LOG2E) + tl.sum(e, axis=AXIS)
    return new_peak, total


@triton.jit
def _load_target(target_ptr, cols, n):
    """In 32 bits, which a vocabulary fits in and halves the registers; -1 for what does not."""
    target = tl.load(target_ptr + cols, mask=cols < n, other=-1)
    return tl.where((target >= 0) & (target < 2147483647), target, -1).to(tl.int32)


@triton.jit
def _store_partial(partial_ptr, split, splits, cols, n, peak, total, picked):
    tl.store(partial_ptr + offset(split, n) + cols, peak, mask=cols < n)
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
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    begin = split * rows_per_split
    stop = tl.minimum(V, begin + rows_per_split)
    for start in range(begin, stop, BLOCK_V):
        ids = start + tl.arange(0, BLOCK_V)
        inside = (ids < stop)[:, None] & (cols < n)[None, :]
        at = logits_ptr + offset(ids, stride_v)[:, None] + cols[None, :]
        x = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        peak, total = _online(x, peak, total, 0)
    mine = (target >= begin) & (target < stop) & (cols < n)
    picked = tl.load(logits_ptr + offset(target, stride_v) + cols, mask=mine, other=0.0).to(tl.float32)
    _store_partial(partial_ptr, split, tl.num_programs(0), cols, n, peak, total, picked)


@triton.jit
def _merge_kernel(
    partial_ptr, target_ptr, stats_ptr, V, n, splits, stride_stats,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """stats = max_s peak_s, sum_s total_s exp(peak_s - peak), sum_s picked_s (-inf: the target is no id)."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    inside = (s < splits)[:, None] & (cols < n)[None, :]
    at = partial_ptr + cols[None, :]
    peaks = tl.load(at + offset(s, n)[:, None], mask=inside, other=float("-inf"))
    totals = tl.load(at + offset(splits + s, n)[:, None], mask=inside, other=0.0)
    picked = tl.sum(tl.load(at + offset(2 * splits + s, n)[:, None], mask=inside, other=0.0), axis=0)
    peak = tl.max(peaks, axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(totals * tl.exp2((peaks - safe[None, :]) * LOG2E), axis=0)
    target = _load_target(target_ptr, cols, n)
    picked = tl.where((target >= 0) & (target < V), picked, float("-inf"))
    out_ptr = stats_ptr + cols
    tl.store(out_ptr, peak, mask=cols < n)
    tl.store(out_ptr + stride_stats, total, mask=cols < n)
    # Added twice: the double of a stride may not fit in 32 bits.
    tl.store(out_ptr + stride_stats + stride_stats, picked, mask=cols < n)


@triton.jit
def _dlogits(x, ids, cols, n, first, target_ptr, coefficient_ptr, stats_ptr, stride_stats):
    """coefficient * (exp(x - peak) / total - (id == target)), exactly 0 where coefficient is."""
    seen = cols < n
    target = _load_target(target_ptr, cols, n)
    coefficient = tl.load(coefficient_ptr + cols, mask=seen, other=0.0)
    peak = tl.load(stats_ptr + cols, mask=seen, other=0.0)
    total = tl.load(stats_ptr + stride_stats + cols, mask=seen, other=1.0)
    p = tl.exp2((x - peak[None, :]) * LOG2E) * (coefficient / total)[None, :]
    g = tl.where((first + ids)[:, None] == target[None, :], p - coefficient[None, :], p)
    # Not a product alone: the logits of a token that does not count may be infinite.
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
def _tile_of_logits(
    a_ptr, b_ptr, a_rows, b_rows, M, N, C, stride_a, stride_b,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """a[a_rows] @ b[b_rows].T in float32, of weight and hidden in either order: 2 BLOCK_A BLOCK_B C FLOPs."""
    # Rows past the end read row 0 instead of a mask on every load; what they give is never used.
    a_ptr += offset(tl.where(a_rows < M, a_rows, 0), stride_a)[:, None]
    b_ptr += offset(tl.where(b_rows < N, b_rows, 0), stride_b)[:, None]
    x = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        if EVEN_C:
            a, b = tl.load(a_ptr + c[None, :]), tl.load(b_ptr + c[None, :])
        else:
            a = tl.load(a_ptr + c[None, :], mask=(c < C)[None, :], other=0.0)
            b = tl.load(b_ptr + c[None, :], mask=(c < C)[None, :], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        # Matters to float32 alone, which TF32 would cut to 10 bits.
        x = tl.dot(a, tl.trans(b), x, input_precision="ieee")
    return x


@triton.jit
def _fused_reduce_kernel(
    weight_ptr, hidden_ptr, target_ptr, coefficient_ptr, partial_ptr,
    V, n, C, stride_w, stride_h, rows_per_split,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """As _reduce_kernel, of logits that exist here alone: 2 V n C FLOPs, 0 for tokens that do not count."""
    # Neighbouring programs share the split's rows of weight and differ in their tokens.
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    target = _load_target(target_ptr, cols, n)
    coefficient = tl.load(coefficient_ptr + cols, mask=cols < n, other=0.0)
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    picked = tl.zeros([BLOCK_N], tl.float32)
    begin = split * rows_per_split
    stop = tl.minimum(V, begin + rows_per_split)
    if tl.max(tl.where(coefficient != 0.0, 1, 0), axis=0) == 0:
        stop = begin
    for start in range(begin, stop, BLOCK_V):
        ids = start + tl.arange(0, BLOCK_V)
        # Tokens along the rows: a thread holds few of them, so what is kept for each costs few registers.
        x = _tile_of_logits(
            hidden_ptr, weight_ptr, cols, ids, n, stop, C, stride_h, stride_w,
            BLOCK_N, BLOCK_V, BLOCK_C, EVEN_C, WIDEN,
        )  # fmt: skip
        x = tl.where((ids < stop)[None, :], x, float("-inf"))
        peak, total = _online(x, peak, total, 1)
        picked += tl.sum(tl.where(ids[None, :] == target[:, None], x, 0.0), axis=1)
    _store_partial(partial_ptr, split, tl.num_programs(1), cols, n, peak, total, picked)


@triton.jit
def _fused_gradient_kernel(
    weight_ptr, hidden_ptr, target_ptr, coefficient_ptr, stats_ptr, dlogits_ptr,
    first, v, n, C, stride_w, stride_h, stride_v, stride_stats,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr,
    GROUP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dlogits = coefficient * (softmax(weight @ hidden.T) - onehot(target)), the logits made here."""
    # GROUP tiles of ids go through all tokens before the next ones: their rows of weight stay in L2.
    across = tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // (GROUP * across)
    size = tl.minimum(tl.cdiv(v, BLOCK_V) - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    ids = (group * GROUP + within % size) * BLOCK_V + tl.arange(0, BLOCK_V)
    cols = within // size * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (ids < v)[:, None] & (cols < n)[None, :]
    at = dlogits_ptr + offset(ids, stride_v)[:, None] + cols[None, :]
    dtype: tl.constexpr = dlogits_ptr.dtype.element_ty
    coefficient = tl.load(coefficient_ptr + cols, mask=cols < n, other=0.0)
    width = tl.where(tl.max(tl.where(coefficient != 0.0, 1, 0), axis=0) == 0, 0, C)
    x = _tile_of_logits(
        weight_ptr, hidden_ptr, ids, cols, v, n, width, stride_w, stride_h,
        BLOCK_V, BLOCK_N, BLOCK_C, EVEN_C, WIDEN,
    )  # fmt: skip
    g = _dlogits(x, ids, cols, n, first, target_ptr, coefficient_ptr, stats_ptr, stride_stats)
    store_rounded(at, g, inside, dtype)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """x *= factor. Bytes: 2 size elements, or none where the factor is 1, as most often."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        at = offset(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        store_rounded(x_ptr + at, x * factor, at < size, x_ptr.dtype.element_ty)


# ---- launchers

# Of the kernels that read logits: 128 tokens are 256 contiguous bytes in 16 bits. The reduction meets between
# threads once a tile, which therefore is taller.
_REDUCE = {"BLOCK_V": 64, "BLOCK_N": 128, "num_warps": 4}
_GRADIENT = {"BLOCK_V": 32, "BLOCK_N": 128, "num_warps": 4}


def _matrix_tiling(dtype: torch.dtype) -> dict[str, int]:
    """Tiles of the kernels that multiply."""
    if INTERPRETED:
        return {"BLOCK_V": 32, "BLOCK_N": 16, "BLOCK_C": 32, "num_warps": 4}
    if dtype == torch.float32:
        return {"BLOCK_V": 64, "BLOCK_N": 64, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_V": 128, "BLOCK_N": 128, "BLOCK_C": 64, "num_warps": 8, "num_stages": 3}


def _splits(V: int, column_blocks: int, block_v: int, device: torch.device) -> tuple[int, int]:
    """Parts of the vocabulary and the rows of each: whole tiles, about four programs a multiprocessor."""
    if device.type == "cuda":
        programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    else:
        programs = 8
    tiles = triton.cdiv(V, block_v)
    splits = max(1, min(tiles, 64, programs // column_blocks))
    rows = triton.cdiv(tiles, splits) * block_v
    return triton.cdiv(V, rows), rows


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _merge(partial: Tensor, target: Tensor, stats: Tensor, V: int) -> None:
    _, splits, n = partial.shape
    block_s = triton.next_power_of_2(splits)
    block_n = max(16, 2048 // block_s)
    _merge_kernel[(triton.cdiv(n, block_n),)](
        partial, target, stats, V, n, splits, stats.stride(0), BLOCK_S=block_s, BLOCK_N=block_n
    )


def launch_reduce(logits: Tensor, target: Tensor, stats: Tensor) -> None:
    """See ``chunked.Steps``."""
    V, n = logits.shape
    blocks = triton.cdiv(n, _REDUCE["BLOCK_N"])
    splits, rows = _splits(V, blocks, _REDUCE["BLOCK_V"], logits.device)
    partial = stats.new_empty(3, splits, n)
    _reduce_kernel[(splits, blocks)](logits, target, partial, V, n, logits.stride(0), rows, **_REDUCE)
    _merge(partial, target, stats, V)


def launch_gradient(logits: Tensor, first: int, target: Tensor, coefficient: Tensor, stats: Tensor) -> None:
    v, n = logits.shape
    grid = (triton.cdiv(v, _GRADIENT["BLOCK_V"]), triton.cdiv(n, _GRADIENT["BLOCK_N"]))
    _gradient_kernel[grid](
        logits, target, coefficient, stats, first, v, n, logits.stride(0), stats.stride(0), **_GRADIENT
    )


def launch_fused_reduce(
    hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor, stats: Tensor
) -> None:
    (n, C), V = hidden.shape, weight.shape[0]
    hidden, weight = _rows_contiguous(hidden), _rows_contiguous(weight)
    tiling = _matrix_tiling(hidden.dtype)
    blocks = triton.cdiv(n, tiling["BLOCK_N"])
    splits, rows = _splits(V, blocks, tiling["BLOCK_V"], hidden.device)
    partial = stats.new_empty(3, splits, n)
    _fused_reduce_kernel[(blocks, splits)](
        weight, hidden, target, coefficient, partial, V, n, C, weight.stride(0), hidden.stride(0), rows,
        EVEN_C=C % tiling["BLOCK_C"] == 0, WIDEN=INTERPRETED, **tiling,
    )  # fmt: skip
    _merge(partial, target, stats, V)


def launch_fused_gradient(
    hidden: Tensor,
    weight: Tensor,
    first: int,
    target: Tensor,
    coefficient: Tensor,
    stats: Tensor,
    dlogits: Tensor,
) -> None:
    (n, C), v = hidden.shape, weight.shape[0]
    hidden, weight = _rows_contiguous(hidden), _rows_contiguous(weight)
    tiling = _matrix_tiling(hidden.dtype)
    grid = (triton.cdiv(v, tiling["BLOCK_V"]) * triton.cdiv(n, tiling["BLOCK_N"]),)
    _fused_gradient_kernel[grid](
        weight, hidden, target, coefficient, stats, dlogits, first, v, n, C,
        weight.stride(0), hidden.stride(0), dlogits.stride(0), stats.stride(0),
        EVEN_C=C % tiling["BLOCK_C"] == 0, GROUP=8, WIDEN=INTERPRETED, **tiling,
    )  # fmt: skip


def launch_scale(x: Tensor, factor: Tensor) -> None:
    """``x *= factor`` for a contiguous ``x`` and a scalar in float32, without waiting to know it."""
    if x.numel():
        _scale_kernel[(triton.cdiv(x.numel(), 4096),)](x, factor, x.numel(), BLOCK=4096)


Step = Callable[..., None]


def steps() -> tuple[Step, Step, Step | None, Step | None]:
    """In the order of ``chunked.Steps``."""
    fused_reduce, fused_gradient = FUSED
    return (
        launch_reduce,
        launch_gradient,
        launch_fused_reduce if fused_reduce else None,
        launch_fused_gradient if fused_gradient else None,
    )
