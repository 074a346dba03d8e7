# SPDX-License-Identifier: Apache-2.0
"""Local attention in two dimensions with Triton: what launches the kernels.

Letters: B batch, H query heads, G query heads a key head, T queries, E extra keys, D head size (BLOCK_D the
power of two it is padded to). Queries go in patches of BLOCK_M, WIDE_M columns wide, keys in patches of
BLOCK_N, WIDE_N columns wide.

A patch of queries walks over the patches of keys that its windows reach, then over the extra keys, under one
softmax. A key's queries are a patch as well: those whose window has it. So a patch of keys walks over the
queries of these, and writes its gradients alone: no atomics. Extra keys walk over all queries.

Scores are in units of log2, s = q.k * factor, with factor = scale * log2(e): 2^s costs one multiply-add and
one ex2 an element.

FLOPs: with N pairs of all heads in the patches that are walked, forward 4 N D (two products), backward 14 N D
(seven: scores and dprobs twice). Of the pairs of a patch some are masked: with 8 x 8 queries and a window of
9 x 9 the walk has 16 x 16 keys. Bytes, forward: q and out once, k and v by each patch whose windows reach
them, out of the L2 cache for the most part.

The kernels are in ``forward_triton`` and ``backward_triton``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cogview_kernels import _device
from cogview_kernels._attention_triton import log2_factor
from cogview_kernels._dropout import Dropout
from cogview_kernels._triton import Launch, Plans, dropout_arguments, precision
from cogview_kernels.local_attention_2d import native
from cogview_kernels.local_attention_2d.backward_triton import dkv_extra_kernel, dkv_kernel, dq_kernel
from cogview_kernels.local_attention_2d.forward_triton import fwd_kernel
from cogview_kernels.local_attention_2d.window import Keys, Window


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    # Registers a thread, where ptxas would spill some for the sake of another block.
    maxnreg: int | None = None

    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "STAGES": self.stages, "maxnreg": self.maxnreg}


# By head size padded to a power of two, at most: fwd, dq, dkv (the extra keys' too). Chosen among what
# compiles without spills; no GPU has timed them.
_SM80_16_BIT = {
    64: (Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 8, 1)),
    128: (Config(64, 32, 8, 2), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    256: (Config(64, 32, 8, 1), Config(64, 16, 8, 1), Config(32, 32, 8, 1)),
}
_SM90_16_BIT = {
    64: (Config(64, 32, 4, 2), Config(64, 64, 4, 2), Config(32, 64, 8, 2)),
    128: (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 8, 1)),
    256: (Config(128, 32, 8, 2), Config(32, 32, 8, 1, 255), Config(32, 32, 8, 1)),
}
_32_BIT = {
    64: (Config(64, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 2)),
    128: (Config(32, 16, 8, 1), Config(16, 16, 8, 1), Config(32, 32, 8, 1)),
    # dq spills with any tile: a thread keeps a row of q and one of dout.
    256: (Config(16, 16, 8, 1), Config(16, 16, 8, 1, 255), Config(16, 16, 8, 1, 255)),
}
_KERNELS = ("fwd", "dq", "dkv")
_WIDE = 8  # columns of a patch, at most


def config(kernel: str, q: Tensor) -> Config:
    table = _SM90_16_BIT if _device.capability(q.device) >= (9, 0) else _SM80_16_BIT
    if q.dtype == torch.float32:
        table = _32_BIT
    return table[max(64, _padded(q.shape[3]))][_KERNELS.index(kernel)]


def _padded(D: int) -> int:
    return max(32, triton.next_power_of_2(D))


class _Call(NamedTuple):
    """What both directions are given; scale is not negative."""

    q: Tensor
    keys: Keys
    window: Window
    scale: float
    dropout: Dropout | None

    def key(self) -> tuple[Any, ...]:
        """All that a plan looks at."""
        q, keys, window, scale, dropout = self
        return (
            q.dtype, q.get_device(), q.shape, q.stride(), window, scale, config, precision(q),
            *((x.shape, x.stride()) for x in keys[:4]), keys.extra_mask is None,
            dropout and dropout.keep_threshold,
        )  # fmt: skip

    def numbers(self) -> tuple[Any, ...]:
        """The numbers in which the kernels agree: strides, then sizes."""
        strides = [x.stride()[:3] for x in (self.q, *self.keys[:4])]
        return tuple(s for three in strides for s in three)

    def flags(self) -> dict[str, Any]:
        D = self.q.shape[3]
        return {
            "HAS_DROPOUT": self.dropout is not None,
            "PRECISION": precision(self.q),
            "D": D,
            "BLOCK_D": _padded(D),
        }

    def of_window(self) -> tuple[int, ...]:
        w = self.window
        return w.height, w.width, w.row_radius, w.column_radius, w.query_scale


def limit(backend: str, q: Tensor, keys: Keys, window: Window) -> str:
    """Why the kernels cannot take a call, and the way out; empty when they can."""
    return native.limit(backend, q, keys, window)


def _patches(height: int, width: int, block: int, wide: int) -> int:
    return triton.cdiv(height, block // wide) * triton.cdiv(width, wide)


def _wide(width: int, block: int) -> int:
    return min(block, triton.next_power_of_2(max(1, width)))


def _tiles_of_queries(window: Window, chosen: Config) -> dict[str, Any]:
    """Of the kernels whose programs have a patch of queries each."""
    wide_m = _wide(min(_WIDE, window.width * window.query_scale), chosen.block_m)
    cells = triton.cdiv(wide_m, window.query_scale) + 2 * window.column_radius
    return {
        "BLOCK_M": chosen.block_m,
        "WIDE_M": wide_m,
        "BLOCK_N": chosen.block_n,
        "WIDE_N": _wide(min(cells, window.width), chosen.block_n),
        **chosen.options(),
    }


def _tiles_of_keys(window: Window, chosen: Config) -> dict[str, Any]:
    """Of the kernel whose programs have a patch of keys each."""
    wide_n = _wide(min(_WIDE, window.width), chosen.block_n)
    seeing = (wide_n + 2 * window.column_radius) * window.query_scale
    return {
        "BLOCK_M": chosen.block_m,
        "WIDE_M": _wide(min(seeing, window.width * window.query_scale), chosen.block_m),
        "BLOCK_N": chosen.block_n,
        "WIDE_N": wide_n,
        **chosen.options(),
    }


def _extra_flags(call: _Call) -> dict[str, bool]:
    return {
        "HAS_EXTRA": call.keys.extra_k.shape[2] > 0,
        "HAS_MASK": call.keys.extra_mask is not None,
        "CAUSAL": call.window.causal,
    }


def _mask(keys: Keys) -> Tensor | None:
    return None if keys.extra_mask is None else keys.extra_mask.contiguous().view(torch.uint8)


def _grid_of_queries(call: _Call, tiles: dict[str, Any]) -> tuple[int]:
    B, H = call.q.shape[:2]
    s = call.window.query_scale
    rows, columns = call.window.height * s, call.window.width * s
    return (_patches(rows, columns, tiles["BLOCK_M"], tiles["WIDE_M"]) * B * H,)


def _plan_forward(call: _Call, out: Tensor) -> Launch:
    H, heads, E = call.q.shape[1], call.keys.k.shape[1], call.keys.extra_k.shape[2]
    _, keep_threshold, keep_scale = dropout_arguments(call.dropout)
    tiles = _tiles_of_queries(call.window, config("fwd", call.q))
    numbers = (
        *call.numbers(), *out.stride()[:3], H, H // heads, E, *call.of_window(), log2_factor(call.scale),
        keep_threshold, keep_scale,
    )  # fmt: skip
    grid = _grid_of_queries(call, tiles)
    return Launch(fwd_kernel, grid, numbers, **_extra_flags(call), **call.flags(), **tiles)


_forward_plans: Plans[Launch] = Plans(_plan_forward)


def forward(
    q: Tensor,
    keys: Keys,
    window: Window,
    scale: float,
    dropout: Dropout | None,
    outputs: tuple[Tensor, Tensor, Tensor],
    _: str,
) -> None:
    """Fills ``outputs``, out, lse and its two parts, see :func:`fwd_kernel`. Rows are contiguous."""
    if scale < 0:
        q, scale = -q, -scale
    call = _Call(q, keys, window, scale, dropout)
    out, lse, peaks = outputs
    plan = _forward_plans.get((call.key(), out.stride()), call, out)
    plan(q, *keys[:4], _mask(keys), out, lse, peaks, seed=dropout_arguments(dropout)[0])


class _Backward(NamedTuple):
    dq: Launch
    dkv: Launch
    dkv_extra: Launch | None


def _plan_backward(
    call: _Call,
    dq_scale: float,
    out: Tensor,
    doutputs: tuple[Tensor, Tensor | None],
    gradients: tuple[Tensor, ...],
) -> _Backward:
    q, keys, window, scale, dropout = call
    dout, dlse = doutputs
    B, H, T, _ = q.shape
    heads, E = keys.k.shape[1], keys.extra_k.shape[2]
    _, keep_threshold, keep_scale = dropout_arguments(dropout)
    kept = (keep_threshold, keep_scale)
    strides_of = lambda *tensors: tuple(s for x in tensors for s in x.stride()[:3])  # noqa: E731
    extra = _extra_flags(call)

    tiles = _tiles_of_queries(window, config("dq", q))
    numbers = (
        *call.numbers(), *strides_of(dout, out, gradients[0]), H, H // heads, E, *call.of_window(), dq_scale,
        log2_factor(scale), *kept,
    )  # fmt: skip
    grid = _grid_of_queries(call, tiles)
    dq = Launch(dq_kernel, grid, numbers, HAS_DLSE=dlse is not None, **extra, **call.flags(), **tiles)

    chosen = config("dkv", q)
    tiles = _tiles_of_keys(window, chosen)
    numbers = (
        *strides_of(q, keys.k, keys.v, dout, *gradients[1:3]), H, H // heads, *call.of_window(), scale,
        log2_factor(scale), *kept,
    )  # fmt: skip
    grid = (_patches(window.height, window.width, tiles["BLOCK_N"], tiles["WIDE_N"]) * B * heads,)
    dkv = Launch(dkv_kernel, grid, numbers, CAUSAL=window.causal, **call.flags(), **tiles)
    if E == 0:
        return _Backward(dq, dkv, None)

    numbers = (
        *strides_of(q, keys.extra_k, keys.extra_v, dout, *gradients[3:5]), H, H // heads, E, window.keys, T,
        scale, log2_factor(scale), *kept,
    )  # fmt: skip
    dkv_extra = Launch(
        dkv_extra_kernel, (triton.cdiv(E, chosen.block_n) * B * heads,), numbers,
        HAS_MASK=extra["HAS_MASK"], **call.flags(),
        BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, **chosen.options(),
    )  # fmt: skip
    return _Backward(dq, dkv, dkv_extra)


_backward_plans: Plans[_Backward] = Plans(_plan_backward)


def backward(
    q: Tensor,
    keys: Keys,
    window: Window,
    scale: float,
    dropout: Dropout | None,
    saved: tuple[Tensor, Tensor, Tensor],
    doutputs: tuple[Tensor, Tensor | None],
    gradients: tuple[Tensor, ...],
    _: str,
) -> None:
    """Fills ``gradients``, of q and of the first four of ``keys``. ``saved`` are the outputs of the forward,
    ``doutputs`` the gradients of out and lse. Rows are contiguous. Three launches, two without extra keys."""
    out, _lse, peaks = saved
    dout, dlse = doutputs
    dq_scale = scale
    if scale < 0:
        # Scores stay what they were; dq belongs to -q, and its sign is turned back by dq_scale.
        q, scale = -q, -scale
    call = _Call(q, keys, window, scale, dropout)
    strides = tuple(x.stride() for x in (out, dout, *gradients))
    key = (call.key(), dq_scale, dlse is None, strides)
    plan = _backward_plans.get(key, call, dq_scale, out, doutputs, gradients)
    delta = peaks.new_empty(q.shape[:3])
    seed = dropout_arguments(dropout)[0]
    mask = _mask(keys)
    dq, dk, dv, dextra_k, dextra_v = gradients
    k, v, extra_k, extra_v, _mask_of_keys = keys
    plan.dq(q, k, v, extra_k, extra_v, mask, out, dout, dlse, peaks, delta, dq, seed=seed)
    plan.dkv(q, k, v, dout, peaks, delta, dk, dv, seed=seed)
    if plan.dkv_extra is not None:
        plan.dkv_extra(q, extra_k, extra_v, mask, dout, peaks, delta, dextra_k, dextra_v, seed=seed)
