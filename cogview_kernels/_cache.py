# SPDX-License-Identifier: Apache-2.0
"""The write of new keys and values into a cache by one short launch, for the model package alone.

PyTorch's ``index_put`` takes twice as long on a GPU, in every layer and step, and does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cogview_kernels import _backends
from cogview_kernels._checks import PLAIN
from cogview_kernels._torch_ops import Op


def can_write(cache: Tensor, new: Tensor) -> bool:
    """Whether :data:`write` takes these, on a GPU; it has no derivative."""
    if not cache.is_cuda or type(new) not in PLAIN or new.dtype != cache.dtype:
        return False
    if torch.is_grad_enabled() and new.requires_grad:
        return False
    has_runs = cache.stride(-1) == 1 == new.stride(-1)
    return has_runs and not _backends.why_not("triton", cache.device)


def _write(cache: Tensor, new: Tensor, places: Tensor) -> None:
    from cogview_kernels import _cache_triton

    if new.numel() > 0:
        _cache_triton.write(cache, new, places.contiguous())
        increment_version(cache)  # a graph that has saved it must not go on with the values of later


# ``cache[b, places[b, t]] = new[b, t]`` of [B, S, 2, H, D], [B, T] and [B, T, 2, H, D]. A place outside the
# cache is not written to.
write = Op(
    "_write_to_cache(Tensor(a!) cache, Tensor new, Tensor places) -> ()",
    kernel=_write,
    fake=lambda *_: None,
)
