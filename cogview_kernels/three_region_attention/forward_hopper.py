# SPDX-License-Identifier: Apache-2.0
"""The compiled forward for Hopper, compute capability 9.0: which calls it takes, and its launch.

It stands in for ``forward_triton.fwd_kernel``: the same arguments, results and residuals. How it works is
told in csrc/three_region_attention/forward_sm90.cuh.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cogview_kernels import _device, _extension
from cogview_kernels._dropout import Dropout
from cogview_kernels.layout import ThreeRegionLayout

_FUNCTION = "three_region_attention_fwd_sm90"
_D = 64


def is_aligned(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> bool:
    """Whether each begins at a multiple of 16 bytes: asked at every call, since no plan knows addresses."""
    return (q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr()) % 16 == 0


def takes(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    layout: ThreeRegionLayout,
    starts: Tensor | None,
    dropout: Dropout | None,
) -> bool:
    """Whether the kernel is compiled, runs on this GPU and does what is asked.

    ``tensors``: q, k, v and out."""
    q = tensors[0]
    return (
        hasattr(_extension.native, _FUNCTION)
        and q.is_cuda
        and _device.capability(q.device) == (9, 0)
        and q.shape[3] == _D
        and q.dtype in (torch.float16, torch.bfloat16)
        and layout.causal
        and starts is None
        and dropout is None
        and all(map(_has_aligned_rows, tensors))
        and is_aligned(*tensors)
    )


def _has_aligned_rows(x: Tensor) -> bool:
    """Copies have 16 bytes each; a stride of positions is kept in 32 bits."""
    return all(stride % 8 == 0 for stride in x.stride()[:3]) and 2 * x.stride(2) < 2**32


def launch(index: tuple[int, int, int, int], factor: float, bias: float) -> Callable[..., None]:
    """``index``: padded pivots and integers of a sample, block size, window blocks. Called as a Launch of
    ``fwd_kernel`` is; the origins and the seed are not looked at."""
    function = getattr(_extension.native, _FUNCTION)
    scores = (factor, bias)

    def run(
        q: Tensor, k: Tensor, v: Tensor, _: Tensor, residuals: Tensor, out: Tensor, lse: Tensor, seed: int
    ) -> None:
        stream = _device.current_stream(q.device)
        function(q, k, v, out, lse.data_ptr(), residuals.data_ptr(), index, scores, stream)

    return run
