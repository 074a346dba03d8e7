# SPDX-License-Identifier: Apache-2.0
"""Stable softmax on NVIDIA GPUs.

Letters: rows R = A * B * T, N elements a row, BLOCK_N columns a tile, BLOCK_R rows a program.
Rows of up to MAX_TILE columns are read once and stay in registers; longer ones are read twice
(running maximum and sum, then the probabilities; backward: dot product, then the gradient).

Bytes, forward: 2 R N elements (3 where read twice). Backward: 3 R N (5). FLOPs: about 6 an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels import _checks
from cogview_kernels._triton import LOG2E, offset, store_rounded
from cogview_kernels.stable_softmax.native import fold, four

MAX_TILE = 16384


@triton.jit
def _row_pointers(base_ptr, rows, B, T, stride_a, stride_b, stride_t):
    t = rows % T
    b = rows // T % B
    a = rows // T // B
    return base_ptr + offset(a, stride_a) + offset(b, stride_b) + offset(t, stride_t)


@triton.jit
def _load_scores(
    scores_ptr, mask_ptr, rows, cols, R, B, T, N,
    stride_sa, stride_sb, stride_st, stride_ma, stride_mb, stride_mt, stride_mn,
    scale, HAS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """``scale * scores`` in float32, -inf where a key is not seen."""
    seen = (rows < R)[:, None] & (cols < N)[None, :]
    if IS_CAUSAL:
        seen = seen & (cols[None, :] <= (rows % T)[:, None])
    if HAS_MASK:
        m_ptr = _row_pointers(mask_ptr, rows, B, T, stride_ma, stride_mb, stride_mt)
        keep = tl.load(m_ptr[:, None] + offset(cols, stride_mn)[None, :], mask=seen, other=0)
        seen = seen & (keep != 0)
    s_ptr = _row_pointers(scores_ptr, rows, B, T, stride_sa, stride_sb, stride_st)
    x = tl.load(s_ptr[:, None] + cols[None, :], mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, x * scale, float("-inf"))


@triton.jit
def _stable_softmax_fwd_kernel(
    scores_ptr, mask_ptr, probs_ptr, R, B, T, N,
    stride_sa, stride_sb, stride_st, stride_ma, stride_mb, stride_mt, stride_mn,
    alpha, scale,
    HAS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, ONE_TILE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """probs = 2^(alpha * log2(e) * (x - max x)) / sum, with x = scale * scores."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_N)
    factor = alpha * LOG2E
    out_ptr = probs_ptr + offset(rows, N)[:, None]
    dtype: tl.constexpr = probs_ptr.dtype.element_ty
    if ONE_TILE:
        x = _load_scores(
            scores_ptr, mask_ptr, rows, cols, R, B, T, N,
            stride_sa, stride_sb, stride_st, stride_ma, stride_mb, stride_mt, stride_mn,
            scale, HAS_MASK, IS_CAUSAL,
        )  # fmt: skip
        row_max = tl.max(x, axis=1)
        # A row without a key: -inf minus -inf would be NaN; from 0 it gives weights of exactly 0.
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        e = tl.exp2((x - row_max[:, None]) * factor)
        total = tl.sum(e, axis=1)
        p = e / tl.where(total == 0.0, 1.0, total)[:, None]
        store_rounded(out_ptr + cols[None, :], p, (rows < R)[:, None] & (cols < N)[None, :], dtype)
    else:
        row_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, N, BLOCK_N):
            x = _load_scores(
                scores_ptr, mask_ptr, rows, start + cols, R, B, T, N,
                stride_sa, stride_sb, stride_st, stride_ma, stride_mb, stride_mt, stride_mn,
                scale, HAS_MASK, IS_CAUSAL,
            )  # fmt: skip
            new_max = tl.maximum(row_max, tl.max(x, axis=1))
            safe = tl.where(new_max == float("-inf"), 0.0, new_max)
            e = tl.exp2((x - safe[:, None]) * factor)
            total = total * tl.exp2((row_max - safe) * factor) + tl.sum(e, axis=1)
            row_max = new_max
        safe = tl.where(row_max == float("-inf"), 0.0, row_max)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        for start in range(0, N, BLOCK_N):
            x = _load_scores(
                scores_ptr, mask_ptr, rows, start + cols, R, B, T, N,
                stride_sa, stride_sb, stride_st, stride_ma, stride_mb, stride_mt, stride_mn,
                scale, HAS_MASK, IS_CAUSAL,
            )  # fmt: skip
            p = tl.exp2((x - safe[:, None]) * factor) * inverse[:, None]
            inside = (rows < R)[:, None] & (start + cols < N)[None, :]
            store_rounded(out_ptr + start + cols[None, :], p, inside, dtype)


@triton.jit
def _stable_softmax_bwd_kernel(
    dprobs_ptr, probs_ptr, dscores_ptr, R, N, factor,
    ONE_TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dscores = factor * probs * (dprobs - sum(dprobs * probs)), factor = alpha * scale."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = offset(rows, N)[:, None]
    dtype: tl.constexpr = dscores_ptr.dtype.element_ty
    if ONE_TILE:
        cols = tl.arange(0, BLOCK_N)
        inside = (rows < R)[:, None] & (cols < N)[None, :]
        p = tl.load(probs_ptr + at + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        dp = tl.load(dprobs_ptr + at + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        dot = tl.sum(p * dp, axis=1)
        store_rounded(dscores_ptr + at + cols[None, :], factor * p * (dp - dot[:, None]), inside, dtype)
    else:
        dot = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, N, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            inside = (rows < R)[:, None] & (cols < N)[None, :]
            p = tl.load(probs_ptr + at + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            dp = tl.load(dprobs_ptr + at + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            dot += tl.sum(p * dp, axis=1)
        for start in range(0, N, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            inside = (rows < R)[:, None] & (cols < N)[None, :]
            p = tl.load(probs_ptr + at + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            dp = tl.load(dprobs_ptr + at + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            store_rounded(dscores_ptr + at + cols[None, :], factor * p * (dp - dot[:, None]), inside, dtype)


def _tiling(N: int) -> dict[str, int | bool]:
    """Tile sizes for rows of N: whole rows up to MAX_TILE, several short rows a program."""
    block_n = min(triton.next_power_of_2(max(N, 1)), MAX_TILE)
    return {
        "ONE_TILE": N <= MAX_TILE,
        "BLOCK_N": block_n,
        "BLOCK_R": max(1, min(16, 1024 // block_n)),
        "num_warps": 4 if block_n <= 2048 else 8 if block_n <= 8192 else 16,
    }


def limit(backend: str, scores: Tensor) -> str:
    """Why the kernels cannot take ``scores``; empty when they can."""
    return _checks.kernel_dtype_limit(backend, "scores", scores)


def forward(
    scores: Tensor, mask: Tensor | None, probs: Tensor, alpha: float, scale: float, causal: bool, _: str
) -> None:
    """Fills ``probs``, which is contiguous; the last dimension of ``scores`` has stride 1."""
    mask = None if mask is None else fold(mask.expand(scores.shape)).view(torch.uint8)
    scores = fold(scores)
    A, B, T, N = four(tuple(scores.shape), 1)
    mask_stride = (0, 0, 0, 0) if mask is None else four(mask.stride(), 0)
    tiling = _tiling(N)
    _stable_softmax_fwd_kernel[(triton.cdiv(A * B * T, tiling["BLOCK_R"]),)](
        scores, scores if mask is None else mask, probs, A * B * T, B, T, N,
        *four(scores.stride(), 0)[:3], *mask_stride, alpha, scale,
        HAS_MASK=mask is not None, IS_CAUSAL=causal, **tiling,
    )  # fmt: skip


def backward(dprobs: Tensor, probs: Tensor, dscores: Tensor, factor: float, _: str) -> None:
    """Fills ``dscores``; all three are contiguous and of one shape."""
    N = probs.shape[-1]
    R = probs.numel() // N
    tiling = _tiling(N)
    _stable_softmax_bwd_kernel[(triton.cdiv(R, tiling["BLOCK_R"]),)](
        dprobs, probs, dscores, R, N, factor, **tiling
    )
