# SPDX-License-Identifier: Apache-2.0
"""What the registrations of layer_norm and sandwich_layer_norm share: arguments for compiled code."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _extension

PB_RELAX_CODES = {None: 0, "row": 1, "tensor": 2}

# Rows wider than this do not fit the registers of one GPU block, which is where the GPU kernels keep them.
GPU_MAX_WIDTH = 4096


BACKENDS = ("triton", "cuda", "cpu", "reference")


def supported(x: Tensor) -> tuple[str, ...]:
    """The backends for rows as wide as those of ``x``."""
    return BACKENDS if x.shape[-1] <= GPU_MAX_WIDTH else ("cpu", "reference")


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def parameter(x: Tensor | None) -> tuple[int, int]:
    """Address and dtype of a weight, a bias or its gradient."""
    return (0, 0) if x is None else (x.data_ptr(), _extension.DTYPE_CODES[x.dtype])


def dropout(p: float, seed: Tensor | None) -> tuple[int, float, int, int]:
    """Threshold, scale, seed, and the address of a seed on a device, where reading it would synchronise."""
    if seed is None or p == 0:
        return 0, 1.0, 0, 0
    threshold = min(round(p * 2**32), 2**32 - 1)
    if seed.device.type == "cpu":
        return threshold, 1 / (1 - p), int(seed.item()) & (2**64 - 1), 0
    return threshold, 1 / (1 - p), 0, seed.data_ptr()


def gradient_of(x: Tensor | None, like: Tensor) -> Tensor:
    """Room for the gradient of a weight or bias; empty where there is none."""
    return like.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


_blocks: dict[torch.device, int] = {}


def blocks(x: Tensor) -> int:
    """Persistent blocks of a CUDA kernel over the rows of ``x``: two for each multiprocessor."""
    if x.device not in _blocks:
        # Off the GPU (in the tests' emulation) fewer than rows, so that blocks take several.
        on_gpu = x.device.type == "cuda"
        _blocks[x.device] = (
            2 * torch.cuda.get_device_properties(x.device).multi_processor_count if on_gpu else 3
        )
    return min(x.numel() // x.shape[-1], _blocks[x.device])


def peaks(x: Tensor, pb_relax: str | None, norms: int) -> Tensor | None:
    """Workspace for the maxima of each block, for each norm."""
    return x.new_empty(norms * blocks(x), dtype=torch.float32) if pb_relax == "tensor" else None


def partials(x: Tensor, slots: int) -> Tensor:
    """Workspace for each block's sums over its rows, one for each gradient of a weight or bias."""
    return x.new_empty((blocks(x), slots, x.shape[-1]), dtype=torch.float32)
