# SPDX-License-Identifier: Apache-2.0
"""Merging attentions on NVIDIA GPUs.

Letters: rows R = B * H * T, one a query, D elements each (BLOCK_D the power of two they are padded to);
BLOCK_R rows a program; COUNT attentions, one to four.

Bound by memory, which is read and written once in each direction. Bytes, forward: COUNT + 1 rows of D
elements a query. Backward: dout and COUNT rows read, COUNT rows written. FLOPs: 2 COUNT an element forward,
3 COUNT backward.
"""

# Triton's tuples grow: x = () and x += (piece,).
# mypy: disable-error-code="assignment"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels import _checks
from cogview_kernels._triton import LN2, LOG2E, Launch, Plans, offset, store_rounded
from cogview_kernels.merge_attention import native

# Elements of a tile: 16 bytes of each row tensor a thread where D is a power of two and dtypes have 16 bits.
_TILE = 2048
_NUM_WARPS = 8
LARGEST_HEAD = 1024


@triton.jit
def _weights(lse_pointers, rows, inside, COUNT: tl.constexpr):
    """``(w, lse)``, w_i = exp(lse_i - lse) each ``[BLOCK_R]``. All are 0 where no attention saw a key."""
    lses = ()
    top = tl.full([rows.shape[0]], float("-inf"), tl.float32)
    for i in tl.static_range(COUNT):
        lses += (tl.load(lse_pointers[i] + rows, mask=inside, other=0.0),)
        top = tl.maximum(top, lses[i])
    # -inf minus -inf would be NaN; from 0 it gives weights of exactly 0.
    safe = tl.where(top == float("-inf"), 0.0, top)
    exponentials = ()
    total = tl.zeros_like(top)
    for i in tl.static_range(COUNT):
        exponentials += (tl.exp2((lses[i] - safe) * LOG2E),)
        total += exponentials[i]
    positive = tl.where(total == 0.0, 1.0, total)
    weights = ()
    for i in tl.static_range(COUNT):
        weights += (exponentials[i] / positive,)
    return weights, tl.where(total == 0.0, float("-inf"), safe + tl.log2(positive) * LN2)


@triton.jit
def _row_pointers(base_ptr, rows, H, T, strides, d):
    """Pointers ``[BLOCK_R, BLOCK_D]``; strides of b, h and t."""
    bh = rows // T
    base_ptr += offset(bh // H, strides[0]) + offset(bh % H, strides[1]) + offset(rows % T, strides[2])
    return base_ptr[:, None] + d[None, :]


@triton.jit
def fwd_kernel(
    output0_ptr, output1_ptr, output2_ptr, output3_ptr, lse0_ptr, lse1_ptr, lse2_ptr, lse3_ptr, out_ptr,
    lse_ptr,
    stride_0b, stride_0h, stride_0t, stride_1b, stride_1h, stride_1t,
    stride_2b, stride_2h, stride_2t, stride_3b, stride_3h, stride_3t, stride_ob, stride_oh, stride_ot,
    R, H, T,
    COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = sum_i w_i output_i;  w_i = exp(lse_i - lse),  lse = ln(sum_i exp(lse_i))."""
    output_pointers = (output0_ptr, output1_ptr, output2_ptr, output3_ptr)
    strides = (
        (stride_0b, stride_0h, stride_0t), (stride_1b, stride_1h, stride_1t),
        (stride_2b, stride_2h, stride_2t), (stride_3b, stride_3h, stride_3t),
    )  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < R
    d = tl.arange(0, BLOCK_D)
    seen = inside[:, None] & (d < D)[None, :]
    weights, lse = _weights((lse0_ptr, lse1_ptr, lse2_ptr, lse3_ptr), rows, inside, COUNT)
    tl.store(lse_ptr + rows, lse, mask=inside)
    out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i in tl.static_range(COUNT):
        pointers = _row_pointers(output_pointers[i], rows, H, T, strides[i], d)
        out += weights[i][:, None] * tl.load(pointers, mask=seen, other=0.0).to(tl.float32)
    pointers = _row_pointers(out_ptr, rows, H, T, (stride_ob, stride_oh, stride_ot), d)
    store_rounded(pointers, out, seen, out_ptr.dtype.element_ty)


@triton.jit
def bwd_kernel(
    output0_ptr, output1_ptr, output2_ptr, output3_ptr, lse0_ptr, lse1_ptr, lse2_ptr, lse3_ptr, dout_ptr,
    dlse_ptr,
    doutput0_ptr, doutput1_ptr, doutput2_ptr, doutput3_ptr, dlse0_ptr, dlse1_ptr, dlse2_ptr, dlse3_ptr,
    stride_0b, stride_0h, stride_0t, stride_1b, stride_1h, stride_1t,
    stride_2b, stride_2h, stride_2t, stride_3b, stride_3h, stride_3t, stride_gb, stride_gh, stride_gt,
    stride_d0b, stride_d0h, stride_d0t, stride_d1b, stride_d1h, stride_d1t,
    stride_d2b, stride_d2h, stride_d2t, stride_d3b, stride_d3h, stride_d3t,
    R, H, T,
    HAS_DLSE: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """doutput_i = w_i dout;  dlse_i = w_i (dot_i - sum_j w_j dot_j + dlse),  dot_i = sum_d output_i dout."""
    output_pointers = (output0_ptr, output1_ptr, output2_ptr, output3_ptr)
    doutput_pointers = (doutput0_ptr, doutput1_ptr, doutput2_ptr, doutput3_ptr)
    dlse_pointers = (dlse0_ptr, dlse1_ptr, dlse2_ptr, dlse3_ptr)
    strides = (
        (stride_0b, stride_0h, stride_0t), (stride_1b, stride_1h, stride_1t),
        (stride_2b, stride_2h, stride_2t), (stride_3b, stride_3h, stride_3t),
    )  # fmt: skip
    strides_d = (
        (stride_d0b, stride_d0h, stride_d0t), (stride_d1b, stride_d1h, stride_d1t),
        (stride_d2b, stride_d2h, stride_d2t), (stride_d3b, stride_d3h, stride_d3t),
    )  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < R
    d = tl.arange(0, BLOCK_D)
    seen = inside[:, None] & (d < D)[None, :]
    weights, _ = _weights((lse0_ptr, lse1_ptr, lse2_ptr, lse3_ptr), rows, inside, COUNT)
    pointers = _row_pointers(dout_ptr, rows, H, T, (stride_gb, stride_gh, stride_gt), d)
    dout = tl.load(pointers, mask=seen, other=0.0).to(tl.float32)
    dots = ()
    mean = tl.zeros([BLOCK_R], tl.float32)
    for i in tl.static_range(COUNT):
        pointers = _row_pointers(output_pointers[i], rows, H, T, strides[i], d)
        dots += (tl.sum(tl.load(pointers, mask=seen, other=0.0).to(tl.float32) * dout, axis=1),)
        mean += weights[i] * dots[i]
        pointers = _row_pointers(doutput_pointers[i], rows, H, T, strides_d[i], d)
        store_rounded(pointers, weights[i][:, None] * dout, seen, doutput0_ptr.dtype.element_ty)
    dlse = tl.zeros([BLOCK_R], tl.float32)
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + rows, mask=inside, other=0.0)
    for i in tl.static_range(COUNT):
        tl.store(dlse_pointers[i] + rows, weights[i] * (dots[i] - mean + dlse), mask=inside)


def limit(backend: str, outputs: Sequence[Tensor]) -> str:
    """Why the kernels cannot take ``outputs``, and the way out; empty when they can."""
    if outputs[0].shape[3] > LARGEST_HEAD:
        return (
            f"the triton backend takes head sizes up to {LARGEST_HEAD}, got {outputs[0].shape[3]}; "
            "use backend='reference'"
        )
    return native.limit(backend, outputs) or _checks.triton_rows_limit("outputs", outputs[0])


def _four(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """In the place of those that are missing the first stands; no kernel looks at it."""
    return (*tensors, *[tensors[0]] * (native.MOST - len(tensors)))


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _key(tensors: Sequence[Tensor], count: int, has_dlse: bool = False) -> tuple[Any, ...]:
    """All that a plan looks at."""
    return tensors[0].shape, tensors[0].get_device(), _strides(*tensors), count, has_dlse


def _plan(kernel: Any, tensors: Sequence[Tensor], count: int, **flags: bool) -> Launch:
    """``tensors``: those of rows of D elements, in the order of the kernel's strides."""
    B, H, T, D = tensors[0].shape
    block_d = triton.next_power_of_2(D)
    block_r = max(1, _TILE // block_d)
    return Launch(
        kernel, (triton.cdiv(B * H * T, block_r),), (*_strides(*tensors), B * H * T, H, T),
        **flags, COUNT=count, D=D, BLOCK_D=block_d, BLOCK_R=block_r, num_warps=_NUM_WARPS,
    )  # fmt: skip


def _plan_forward(tensors: Sequence[Tensor], count: int) -> Launch:
    return _plan(fwd_kernel, tensors, count)


def _plan_backward(tensors: Sequence[Tensor], count: int, has_dlse: bool) -> Launch:
    return _plan(bwd_kernel, tensors, count, HAS_DLSE=has_dlse)


_forward_plans: Plans[Launch] = Plans(_plan_forward)
_backward_plans: Plans[Launch] = Plans(_plan_backward)


def forward(outputs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor, _: str) -> None:
    """Fills ``out`` and ``lse``. Rows are contiguous."""
    count = len(outputs)
    outputs = _four(outputs)
    tensors = (*outputs, out)
    plan = _forward_plans.get(_key(tensors, count), tensors, count)
    plan(*outputs, *_four(lses), out, lse)


def backward(
    outputs: Sequence[Tensor],
    lses: Sequence[Tensor],
    doutputs: tuple[Tensor, Tensor | None],
    gradients: tuple[Sequence[Tensor], Sequence[Tensor]],
    _: str,
) -> None:
    """Fills ``gradients``, of outputs and lses; ``doutputs``: the gradients of out and lse."""
    dout, dlse = doutputs
    count = len(outputs)
    outputs, of_outputs = _four(outputs), _four(gradients[0])
    tensors = (*outputs, dout, *of_outputs)
    plan = _backward_plans.get(_key(tensors, count, dlse is not None), tensors, count, dlse is not None)
    plan(*outputs, *_four(lses), dout, dlse, *of_outputs, *_four(gradients[1]))
