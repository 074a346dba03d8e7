# SPDX-License-Identifier: Apache-2.0
"""The linear layer of few rows on NVIDIA GPUs from compute capability 8.0: bound by the reading of weights.

Letters: N rows of x, K inputs, O outputs.

Up to four rows (eight in float32) are multiplied and summed without matrix units: a warp has an output, and
loads a run of its weights straight into registers, 5 KB at once, so that the warps of a multiprocessor keep
over 60 KB under way, three times what the memory's latency asks for, with no barrier among them. Programs
are small and many, and no number of multiprocessors leaves a tail worth speaking of.

More rows in 16 bits go to the matrix units. A program reads all of x, so it has 32 outputs, and where those
make few programs each has more tiles under way instead. Its warps share K, which they sum up at the end.

Both add in an order that shapes and dtypes alone decide: two runs give the same bits.

Bytes: K O of weights, once; x once a program, out of the caches. FLOPs: 2 N K O.
"""

# Triton's tuples grow: x = () and x += (piece,).
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels import _device
from cogview_kernels._triton import _WIDEN, Launch, Plans, offset, store_rounded
from cogview_kernels.decode_linear import launch_config, native


@triton.jit
def _finish(total, bias, GELU: tl.constexpr):
    """Bias and activation of sums in float32."""
    total += bias
    if GELU:
        # x / (1 + e^-2u) is x (1 + tanh u) / 2. The power is of a negative number, so that none overflows.
        twice = total * (1.5957691216057308 + 0.07135481282052142 * total * total)
        power = tl.exp(-tl.abs(twice))
        total = total * tl.where(twice < 0, power, 1.0) / (1.0 + power)
    return total


@triton.jit
def _load_bias(bias_ptr, o):
    if bias_ptr is None:
        bias = tl.zeros(o.shape, tl.float32)
    else:
        bias = tl.load(bias_ptr + o).to(tl.float32)
    return bias


@triton.jit
def _load(pointers, k, K, WHOLE: tl.constexpr, EVICTION: tl.constexpr):
    """Zeros from column K on, where there are such columns."""
    if WHOLE:
        x = tl.load(pointers, eviction_policy=EVICTION)
    else:
        x = tl.load(pointers, mask=k < K, other=0.0, eviction_policy=EVICTION)
    return x


@triton.jit
def _vector_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, stride_w, N, K, O,
    GELU: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """y = act(x weight^T + bias) of ROWS rows and of OUTPUTS outputs a warp. ``WHOLE``: turns divide K.

    Every tile is [WARPS, BLOCK_K], a run of a row in each warp, and that of x has the same run in each: one
    of another shape would have another layout, and change it through shared memory."""
    # Programs of the same outputs are neighbours: all but the first find their weights in the L2 cache.
    groups = tl.cdiv(N, ROWS)
    first = tl.program_id(0) % groups * ROWS
    start_o = tl.program_id(0) // groups * (OUTPUTS * WARPS)
    warp = tl.arange(0, WARPS)
    weight_ptrs = ()
    biases = ()
    for i in tl.static_range(OUTPUTS):
        # Past the last row or output, that one is read again, without a mask.
        o = tl.minimum(start_o + i * WARPS + warp, O - 1)
        weight_ptrs += (weight_ptr + offset(o, stride_w)[:, None],)
        biases += (_load_bias(bias_ptr, o),)
    acc = ()
    for _ in tl.static_range(ROWS * OUTPUTS):
        acc += (tl.zeros([WARPS, BLOCK_K], tl.float32),)
    for start in tl.range(0, K, PIECES * BLOCK_K, num_stages=1):
        weights = ()
        for piece in tl.static_range(PIECES):
            k = start + piece * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            for i in tl.static_range(OUTPUTS):
                weights += (_load(weight_ptrs[i] + k, k, K, WHOLE, "evict_first"),)
        # Without it ptxas would save registers: each load would wait until the one before it is used up.
        tl.debug_barrier()
        for piece in tl.static_range(PIECES):
            k = start + piece * BLOCK_K + tl.arange(0, BLOCK_K)[None, :] + tl.zeros([WARPS, 1], tl.int32)
            sums = ()
            for n in tl.static_range(ROWS):
                row = tl.minimum(first + n, N - 1)
                x = _load(x_ptr + offset(row, K) + k, k, K, WHOLE, "").to(tl.float32)
                for i in tl.static_range(OUTPUTS):
                    w = weights[piece * OUTPUTS + i].to(tl.float32)
                    sums += (acc[n * OUTPUTS + i] + w * x,)
            acc = sums
    for n in tl.static_range(ROWS):
        for i in tl.static_range(OUTPUTS):
            y = _finish(tl.sum(acc[n * OUTPUTS + i], axis=1), biases[i], GELU)
            o = start_o + i * WARPS + warp
            inside = (o < O) & (first + n < N)
            store_rounded(y_ptr + offset(first + n, O) + o, y, inside, y_ptr.dtype.element_ty)


@triton.jit
def _tile_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, stride_w, N, K, O,
    GELU: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y^T = act(weight x^T + bias) of all rows and BLOCK_O outputs. A batch of products has one a warp."""
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    o = tl.minimum(outputs, O - 1)
    rows = tl.arange(0, BLOCK_N)
    bias = _load_bias(bias_ptr, o)
    in_warp = tl.arange(0, WARPS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    weight_ptrs = weight_ptr + offset(o, stride_w)[None, :, None]
    x_ptrs = x_ptr + offset(tl.minimum(rows, N - 1), K)[None, :, None]
    acc = tl.zeros([WARPS, BLOCK_O, BLOCK_N], tl.float32)
    for start in tl.range(0, K, WARPS * BLOCK_K, num_stages=STAGES):
        k = (start + in_warp)[:, None, :]
        w = _load(weight_ptrs + k, k, K, WHOLE, "evict_first")
        x = _load(x_ptrs + k, k, K, WHOLE, "")
        if _WIDEN:
            w, x = w.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc)
    y = _finish(tl.sum(acc, axis=0), bias[:, None], GELU)
    inside = (outputs < O)[:, None] & (rows < N)[None, :]
    pointers = y_ptr + outputs[:, None] + offset(rows, O)[None, :]
    store_rounded(pointers, y, inside, y_ptr.dtype.element_ty)


def limit(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Why the kernels cannot take these, and the way out; empty when they can."""
    if reason := native.limit(backend, x, weight, bias):
        return reason
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        return (
            f"the {backend} backend takes a weight of contiguous rows, got strides {weight.stride()}; "
            "use backend='reference'"
        )
    return ""


def _plan(x: Tensor, weight: Tensor, gelu: bool) -> Launch:
    O, K = weight.shape
    N = x.numel() // K
    numbers = weight.stride(0), N, K, O
    if N >= launch_config.MATRIX_UNITS_FROM and x.element_size() == 2:
        t = launch_config.tiles(N, O, _device.multiprocessors(x.device))
        return Launch(
            _tile_kernel, (triton.cdiv(O, t.block_o),), numbers,
            GELU=gelu, WHOLE=K % (t.num_warps * t.block_k) == 0, BLOCK_N=t.block_n, BLOCK_O=t.block_o,
            BLOCK_K=t.block_k, WARPS=t.num_warps, STAGES=t.stages, num_warps=t.num_warps,
        )  # fmt: skip
    v = launch_config.vectors(N, K, x.element_size())
    return Launch(
        _vector_kernel, (triton.cdiv(O, v.outputs * v.num_warps) * triton.cdiv(N, v.rows),), numbers,
        GELU=gelu, WHOLE=K % (v.pieces * v.block_k) == 0, ROWS=v.rows, OUTPUTS=v.outputs,
        BLOCK_K=v.block_k, PIECES=v.pieces, WARPS=v.num_warps, num_warps=v.num_warps,
    )  # fmt: skip


_plans: Plans[Launch] = Plans(_plan)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, y: Tensor, _: str
) -> None:
    """Fills ``y``, by one launch. Rows of ``weight`` are contiguous, the others throughout."""
    key = x.numel(), weight.shape, weight.stride(0), x.dtype, x.get_device(), bias is None, activation
    _plans.get(key, x, weight, activation is not None)(x, weight, bias, y)
