# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels of several ops share."""

from __future__ import annotations

import triton
import triton.language as tl

from cogview_kernels._triton import dropout_keeps

# Below every finite float32 score; -inf would make NaN of a row that has seen no key yet.
LOWEST = tl.constexpr(-3.4028234663852886e38)

# ptxas runs matrix products one after the other (warning C7515) where the loop over G heads is known to turn
# once, as Triton would make it known for G = 1.
NO_SPECIALIZATION = ["seed", "keep_threshold", "G"]


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
