# SPDX-License-Identifier: Apache-2.0
"""What kernels ask of a device: its properties, read once, and its current stream.

Every question about a GPU goes through here, so that a test can pretend another one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Properties:
    """Of a GPU."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int


# What Triton's interpreter stands for, so that kernels get the tiles of a GPU. Few multiprocessors, so that a
# persistent program takes several rows in small tests too.
INTERPRETED = Properties("Triton's interpreter", (9, 0), 2)

_properties: dict[torch.device, Properties] = {}


def properties(device: torch.device) -> Properties:
    """Those of a GPU, or :data:`INTERPRETED` for a CPU, on which kernels for a GPU are interpreted."""
    known = _properties.get(device)
    if known is None:
        if device.type != "cuda":
            return INTERPRETED
        gpu = torch.cuda.get_device_properties(device)
        known = Properties(gpu.name, (gpu.major, gpu.minor), gpu.multi_processor_count)
        _properties[device] = known
    return known


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, ``(9, 0)`` for an H100."""
    return properties(device).capability


def multiprocessors(device: torch.device) -> int:
    return properties(device).multiprocessors


@functools.cache
def emulates(dtype: torch.dtype) -> bool:
    """Whether PyTorch has no matrix products in ``dtype`` for this machine's processor but plain loops.

    On an AMD EPYC with AVX2 a large one took 140 times as long as in float32. A PyTorch that is built without
    oneDNN, as for macOS, cannot tell: its own products are taken then.
    """
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    is_supported = getattr(torch.ops.mkldnn, names[dtype], None) if dtype in names else None
    return is_supported is not None and not is_supported()


def current_stream(device: torch.device | None = None) -> int:
    """The cudaStream_t that PyTorch launches on, as an integer, of a GPU (None: the current one).

    0 for a CPU, on which interpreted kernels run one after the other."""
    if device is not None and device.type != "cuda":
        return 0
    return torch.cuda.current_stream(device).cuda_stream


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a GPU is being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def wait_for_stream(device: torch.device) -> None:
    """Waits until all that was launched on the current stream of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
