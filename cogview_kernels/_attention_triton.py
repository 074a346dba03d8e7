# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels of several ops share."""

from __future__ import annotations

import triton
import triton.language as tl

from cogview_kernels._triton import LOG2E, dropout_keeps

# Below every finite float32 score; -inf would make NaN of a row that has seen no key yet.
LOWEST = tl.constexpr(-3.4028234663852886e38)

SMALLEST_NORMAL = 1.1754943508222875e-38  # of float32

# ptxas runs matrix products one after the other (warning C7515) where the loop over G heads is known to turn
# once, as Triton would make it known for G = 1.
NO_SPECIALIZATION = ["seed", "keep_threshold", "G"]


def log2_factor(scale: float) -> float:
    """scale * log2(e); 0 becomes the least normal number, since a masked score of -inf times 0 is NaN."""
    return max(scale * LOG2E.value, SMALLEST_NORMAL)


@triton.jit
def softmax_step(
    acc, row_max, rest, total, s, factor, bias, v, columns, r0, r1, keep_threshold,
    IS_FLOAT32: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a tile of raw products ``s`` (-inf: not seen) to the running maximum, sum and output.

    The difference to the largest score of the tile comes first: ``s * factor - peak`` in one fused
    multiply-add would be off by what was rounded when the peak itself was computed, half an ulp of it: no
    harm below 2^22, but 2^2900 for the largest scores of float16. ``rest`` is what the maximum was rounded
    by; the backward needs it for the same reason."""
    top = tl.maximum(tl.max(s, axis=1), LOWEST)  # of a row that sees no key here, -inf - -inf would be NaN
    peak = tl.fma(top, factor, bias)
    new_max = tl.maximum(row_max, peak)
    rest = tl.where(peak > row_max, tl.fma(top, factor, -peak) + bias, rest)
    p = tl.exp2(tl.fma(s - top[:, None], factor, (peak - new_max)[:, None]))
    shrink = tl.exp2(row_max - new_max)
    total = total * shrink + tl.sum(p, axis=1)
    if HAS_DROPOUT:
        p = tl.where(dropout_keeps(r0[:, None], r1[:, None], columns[None, :], keep_threshold), p, 0.0)
    if IS_FLOAT32:
        # The sum of the tile by itself, then added: one long chain of additions would err more.
        acc = tl.fma(acc, shrink[:, None], tl.dot(p, v, input_precision=PRECISION))
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, rest, total


@triton.jit
def probabilities(s, factor, peak, rest, TWO_PEAKS: tl.constexpr):
    """2^(s factor - peak - rest); the first difference is exact where it is small, however large the peak.

    Without TWO_PEAKS it is 2^(s factor - peak), whose exponent rounding could make large: it ends at 0."""
    exponent = tl.fma(s, factor, -peak)
    return tl.exp2(exponent - rest if TWO_PEAKS else tl.minimum(exponent, 0.0))


@triton.jit
def dq_step(
    dq, dout, delta, peak, rest, s, factor, k, v, columns, r0, r1, keep_threshold, keep_scale,
    TWO_PEAKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds ds k for a tile of raw products ``s``; the bias was taken off the peaks."""
    p = probabilities(s, factor, peak[:, None], rest[:, None], TWO_PEAKS)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        keeps = dropout_keeps(r0[:, None], r1[:, None], columns[None, :], keep_threshold)
        dp = tl.where(keeps, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
