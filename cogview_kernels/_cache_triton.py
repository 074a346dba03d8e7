# SPDX-License-Identifier: Apache-2.0
"""The kernel of ``_cache``. Imported only once a Triton kernel is to run."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cogview_kernels._triton import Launch, Plans, offset

_BLOCK = 1024


@triton.jit
def _write_kernel(
    cache_ptr, new_ptr, places_ptr,
    stride_cb, stride_cs, stride_c2, stride_ch, stride_nb, stride_nt, stride_n2, stride_nh,
    T, S, H, programs, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A copy of BLOCK of the 2 H D numbers of one new token."""
    token = tl.program_id(0) // programs
    i = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    head = i // D
    which, head, d = head // H, head % H, i % D
    inside = which < 2
    new_ptr += offset(token // T, stride_nb) + offset(token % T, stride_nt)
    new = tl.load(new_ptr + offset(which, stride_n2) + offset(head, stride_nh) + d, mask=inside)
    place = tl.load(places_ptr + token).to(tl.int64)
    cache_ptr += offset(token // T, stride_cb) + place * stride_cs
    pointers = cache_ptr + offset(which, stride_c2) + offset(head, stride_ch) + d
    # A wrong place must not leave the cache.
    tl.store(pointers, new, mask=inside & (place >= 0) & (place < S))


def _plan(cache: Tensor, new: Tensor) -> Launch:
    B, T, _, H, D = new.shape
    programs = triton.cdiv(2 * H * D, _BLOCK)
    numbers = *cache.stride()[:4], *new.stride()[:4], T, cache.shape[1], H, programs
    return Launch(_write_kernel, (B * T * programs,), numbers, D=D, BLOCK=_BLOCK, num_warps=4)


_plans: Plans[Launch] = Plans(_plan)


def write(cache: Tensor, new: Tensor, places: Tensor) -> None:
    """``places`` is contiguous, and so is the last dimension of the others."""
    key = new.shape, cache.shape[1], cache.stride(), new.stride(), new.dtype, new.get_device()
    _plans.get(key, cache, new)(cache, new, places)
