# SPDX-License-Identifier: Apache-2.0
"""Stable softmax on NVIDIA GPUs.

Letters: rows R = A * B * T, N elements a row, BLOCK_R rows a program, BLOCK_N columns a piece. A row is a
tuple of pieces, since a tile is a power of two, and one for a row of 2,560 would be of 4,096.

The first KEPT pieces of a row are read once and stay in registers. Where that is not the whole row, the REST
is read twice (running maximum and sum, then the probabilities; backward: dot product, then the gradient). The
second read finds the REST in the L2 cache, as a program then works on one row.

Bytes, forward: 2 R N elements, 1.5 where causal and N = T. Backward: 3 R N. FLOPs: about 6 an element.
"""

# Triton's tuples grow: x = () and x += (piece,).
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels import _checks
from cogview_kernels._triton import LOG2E, Launch, Plans, offset, store_rounded
from cogview_kernels.stable_softmax.native import fold, four


@triton.jit
def _row_pointers(base_ptr, rows, B, T, stride_a, stride_b, stride_t):
    t = rows % T
    b = rows // T % B
    a = rows // T // B
    return base_ptr + offset(a, stride_a) + offset(b, stride_b) + offset(t, stride_t)


@triton.jit
def _load(pointers, cols, bound, ALL: tl.constexpr):
    """A piece of each row, 0 from column ``bound`` on; ``ALL``: no column reaches it."""
    pointers = pointers[:, None] + cols[None, :]
    if ALL:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=cols[None, :] < bound[:, None], other=0)
    return x


@triton.jit
def _load_scores(
    score_pointers, mask_pointers, stride_mn, cols, last_key, bound, scale,
    HAS_MASK: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """``scale * scores`` in float32, -inf where a key is not seen; ``ALL``: none is past the last key."""
    x = _load(score_pointers, cols, bound, ALL).to(tl.float32) * scale
    if not ALL:
        x = tl.where(cols[None, :] <= last_key[:, None], x, float("-inf"))
    if HAS_MASK:
        pointers = mask_pointers[:, None] + offset(cols, stride_mn)[None, :]
        keep = tl.load(pointers, mask=cols[None, :] < bound[:, None], other=0)
        x = tl.where(keep != 0, x, float("-inf"))
    return x


@triton.jit
def _stable_softmax_fwd_kernel(
    scores_ptr, mask_ptr, probs_ptr, R, B, T, N,
    stride_sa, stride_sb, stride_st, stride_ma, stride_mb, stride_mt, stride_mn,
    alpha, scale,
    HAS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr,
    KEPT: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """probs = 2^(alpha * log2(e) * (x - max x)) / sum, with x = scale * scores."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    stored = (rows < R)[:, None]
    # Surplus rows read the last one, so that loads need no mask of rows.
    rows = tl.minimum(rows, R - 1)
    score_pointers = _row_pointers(scores_ptr, rows, B, T, stride_sa, stride_sb, stride_st)
    mask_pointers = score_pointers
    if HAS_MASK:
        mask_pointers = _row_pointers(mask_ptr, rows, B, T, stride_ma, stride_mb, stride_mt)
    out_ptr = probs_ptr + offset(rows, N)[:, None]
    dtype: tl.constexpr = probs_ptr.dtype.element_ty
    factor = alpha * LOG2E
    cols = tl.arange(0, BLOCK_N)
    last_key = tl.zeros_like(rows) + (N - 1)
    bound = tl.zeros_like(rows) + N
    if IS_CAUSAL:
        last_key = tl.minimum(last_key, rows % T)
        # A mask that can end at any column turns a load of 16 bytes into eight of two. So the bound of loads
        # is a multiple of 16, and what lies past the last key is deselected after the load.
        bound = tl.minimum(bound, rows % T // 16 * 16 + 16)
    # The rest of a row is what stands before the pieces that are kept, so it has no ragged end.
    first = 0
    if REST:
        first = (tl.cdiv(N, BLOCK_N) - KEPT) * BLOCK_N
        # The running maximum and sum are those of a thread, and no turn waits for others.
        VECTOR: tl.constexpr = 128 // dtype.primitive_bitwidth
        rest_max = tl.full([BLOCK_R, BLOCK_N // VECTOR], float("-inf"), tl.float32)
        rest_total = tl.zeros([BLOCK_R, BLOCK_N // VECTOR], tl.float32)
        for start in tl.range(0, first, BLOCK_N, num_stages=STAGES):
            seen = _load_scores(
                score_pointers, mask_pointers, stride_mn, start + cols, last_key, bound, scale,
                HAS_MASK, not IS_CAUSAL,
            )  # fmt: skip
            seen = tl.reshape(seen, [BLOCK_R, BLOCK_N // VECTOR, VECTOR])
            new_max = tl.maximum(rest_max, tl.max(seen, axis=2))
            safe = tl.where(new_max == float("-inf"), 0.0, new_max)
            e = tl.exp2((seen - safe[:, :, None]) * factor)
            rest_total = rest_total * tl.exp2((rest_max - safe) * factor) + tl.sum(e, axis=2)
            rest_max = new_max
        largest = tl.max(rest_max, axis=1)
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        rest_total = tl.sum(rest_total * tl.exp2((rest_max - safe[:, None]) * factor), axis=1)
        rest_max = largest
    x = ()
    largest = tl.full([BLOCK_R, BLOCK_N], float("-inf"), tl.float32)
    for i in tl.static_range(KEPT):
        seen = _load_scores(
            score_pointers, mask_pointers, stride_mn, first + i * BLOCK_N + cols, last_key, bound, scale,
            HAS_MASK, not IS_CAUSAL and i + 1 < KEPT,
        )  # fmt: skip
        largest = tl.maximum(largest, seen)
        x += (seen,)
    row_max = tl.max(largest, axis=1)
    if REST:
        row_max = tl.maximum(row_max, rest_max)
    # A row without a key: -inf minus -inf would be NaN; from 0 it gives weights of exactly 0.
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = ()
    sums = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for i in tl.static_range(KEPT):
        weights += (tl.exp2((x[i] - row_max[:, None]) * factor),)
        sums += weights[i]
    total = tl.sum(sums, axis=1)
    if REST:
        total += rest_total * tl.exp2((rest_max - row_max) * factor)
    inverse = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    for i in tl.static_range(KEPT):
        at = first + i * BLOCK_N + cols[None, :]
        store_rounded(out_ptr + at, weights[i] * inverse, stored & (at < N), dtype)
    if REST:
        for start in tl.range(0, first, BLOCK_N, num_stages=STAGES):
            x_rest = _load_scores(
                score_pointers, mask_pointers, stride_mn, start + cols, last_key, bound, scale,
                HAS_MASK, not IS_CAUSAL,
            )  # fmt: skip
            p = tl.exp2((x_rest - row_max[:, None]) * factor) * inverse
            store_rounded(out_ptr + start + cols[None, :], p, stored, dtype)


@triton.jit
def _stable_softmax_bwd_kernel(
    dprobs_ptr, probs_ptr, dscores_ptr, R, N, factor,
    KEPT: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dscores = factor * probs * (dprobs - sum(dprobs * probs)), factor = alpha * scale."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    stored = (rows < R)[:, None]
    at = offset(tl.minimum(rows, R - 1), N)
    dtype: tl.constexpr = dscores_ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK_N)
    bound = tl.zeros_like(rows) + N
    products = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    # As in the forward, the rest stands before what is kept.
    first = 0
    if REST:
        first = (tl.cdiv(N, BLOCK_N) - KEPT) * BLOCK_N
        for start in tl.range(0, first, BLOCK_N, num_stages=STAGES):
            p_rest = _load(probs_ptr + at, start + cols, bound, True).to(tl.float32)
            dp_rest = _load(dprobs_ptr + at, start + cols, bound, True).to(tl.float32)
            products += p_rest * dp_rest
    p = ()
    dp = ()
    for i in tl.static_range(KEPT):
        piece = first + i * BLOCK_N + cols
        p += (_load(probs_ptr + at, piece, bound, i + 1 < KEPT).to(tl.float32),)
        dp += (_load(dprobs_ptr + at, piece, bound, i + 1 < KEPT).to(tl.float32),)
        products += p[i] * dp[i]
    dot = tl.sum(products, axis=1)[:, None]
    out_ptr = dscores_ptr + at[:, None]
    for i in tl.static_range(KEPT):
        to = first + i * BLOCK_N + cols[None, :]
        store_rounded(out_ptr + to, factor * p[i] * (dp[i] - dot), stored & (to < N), dtype)
    if REST:
        for start in tl.range(0, first, BLOCK_N, num_stages=STAGES):
            p_rest = _load(probs_ptr + at, start + cols, bound, True).to(tl.float32)
            dp_rest = _load(dprobs_ptr + at, start + cols, bound, True).to(tl.float32)
            dx = factor * p_rest * (dp_rest - dot)
            store_rounded(out_ptr + start + cols[None, :], dx, stored, dtype)


def tiling(N: int, element_size: int, values: int) -> dict[str, int | bool]:
    """A thread has 16 bytes of each piece, and keeps at most ``values`` elements of a row in registers.

    Warps are added as long as there are more than 40 elements a thread. Rows of few warps share a program."""
    vector = 16 // element_size
    row_warps = min(16, triton.next_power_of_2(triton.cdiv(N, 32 * 40)))
    num_warps = max(4, row_warps)
    block_n = min(triton.next_power_of_2(N), 32 * row_warps * vector)
    pieces = triton.cdiv(N, block_n)
    rest = pieces > values // vector
    return {
        # The loops over the rest need registers too.
        "KEPT": (values - 8) // vector if rest else pieces,
        "REST": rest,
        "BLOCK_R": min(64, 32 * num_warps * vector // block_n),
        "BLOCK_N": block_n,
        # A copy to shared memory has 4 bytes or more, and many small ones gain nothing.
        "STAGES": 5 if N % 16 == 0 else 1,
        "num_warps": num_warps,
    }


def limit(backend: str, scores: Tensor) -> str:
    """Why the kernels cannot take ``scores``; empty when they can."""
    return _checks.kernel_dtype_limit(backend, "scores", scores) or _checks.triton_rows_limit(
        "scores", scores
    )


def _plan_forward(scores: Tensor, mask: Tensor | None, alpha: float, scale: float, causal: bool) -> Launch:
    A, B, T, N = four(tuple(scores.shape), 1)
    mask_stride = (0, 0, 0, 0) if mask is None else four(mask.stride(), 0)
    # Masks take registers, and so do the addresses where each element is loaded by itself.
    values = 64 if mask is None and not causal and N % 16 == 0 else 40
    tiles = tiling(N, scores.element_size(), values)
    return Launch(
        _stable_softmax_fwd_kernel,
        (triton.cdiv(A * B * T, tiles["BLOCK_R"]),),
        (A * B * T, B, T, N, *four(scores.stride(), 0)[:3], *mask_stride, alpha, scale),
        HAS_MASK=mask is not None,
        IS_CAUSAL=causal,
        **tiles,
    )


_forward_plans: Plans[Launch] = Plans(_plan_forward)


def forward(
    scores: Tensor, mask: Tensor | None, probs: Tensor, alpha: float, scale: float, causal: bool, _: str
) -> None:
    """Fills ``probs``, which is contiguous; the last dimension of ``scores`` has stride 1."""
    mask = None if mask is None else fold(mask.expand(scores.shape)).view(torch.uint8)
    scores = fold(scores)
    key = (
        scores.shape, scores.stride(), scores.dtype, scores.get_device(),
        None if mask is None else mask.stride(), alpha, scale, causal,
    )  # fmt: skip
    launch = _forward_plans.get(key, scores, mask, alpha, scale, causal)
    launch(scores, scores if mask is None else mask, probs)


def _plan_backward(R: int, N: int, element_size: int, factor: float) -> Launch:
    tiles = tiling(N, element_size, 40)
    return Launch(_stable_softmax_bwd_kernel, (triton.cdiv(R, tiles["BLOCK_R"]),), (R, N, factor), **tiles)


_backward_plans: Plans[Launch] = Plans(_plan_backward)


def backward(dprobs: Tensor, probs: Tensor, dscores: Tensor, factor: float, _: str) -> None:
    """Fills ``dscores``; all three are contiguous and of one shape."""
    N = probs.shape[-1]
    R = probs.numel() // N
    shape = (R, N, probs.element_size(), factor)
    _backward_plans.get((shape, probs.get_device()), *shape)(dprobs, probs, dscores)
