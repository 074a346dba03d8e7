# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the Triton kernels: a table for each chip, and results of tuning kept on disk.

A first call does not tune: it takes the shipped table. With ``COGVIEW_KERNELS_AUTOTUNE=1`` the first call of
a kernel for a (GPU, head size, dtype, block size) times a few candidates on the tensors at hand and keeps the
winner in ``$COGVIEW_KERNELS_CACHE/three_region_attention.json`` (default ``~/.cache/cogview_kernels``), which
later processes read under the same switch. Other tiles sum in another order, so results differ in their last
bits between configurations; under one configuration two runs give the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

AUTOTUNE = os.environ.get("COGVIEW_KERNELS_AUTOTUNE", "0") not in ("", "0")

# fwd, dq: BLOCK_M queries walk over BLOCK_N keys at a time; dkv (window), dkv_far (pivots): BLOCK_N keys walk
# over BLOCK_M queries at a time.
KERNELS = ("fwd", "dq", "dkv", "dkv_far")


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    maxnreg: int | None = None  # registers a thread, where fewer let one more block run on a processor


# By head size padded to a power of two (32 also serves what is smaller): fwd, dq, dkv, dkv_far.
_Row = tuple[Config, Config, Config, Config]
_SM80_16_BIT: dict[int, _Row] = {
    32: (Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(64, 128, 8, 3), Config(64, 128, 8, 3)),
    64: (Config(128, 64, 4, 3), Config(128, 64, 8, 2), Config(64, 128, 8, 2), Config(64, 128, 8, 2)),
    128: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(32, 128, 8, 2), Config(32, 128, 8, 2)),
    256: (Config(64, 32, 4, 2), Config(64, 32, 8, 1), Config(32, 64, 8, 1), Config(32, 64, 8, 1)),
}
_FP32: dict[int, _Row] = {
    32: (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2), Config(32, 64, 4, 2)),
    64: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 8, 2), Config(32, 64, 8, 2)),
    128: (Config(64, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    256: (Config(32, 16, 8, 1), Config(32, 16, 8, 1), Config(16, 32, 8, 1), Config(16, 32, 8, 1)),
}
DEFAULTS: dict[tuple[int, int], dict[int, _Row]] = {
    (80, 16): _SM80_16_BIT,
    (86, 16): _SM80_16_BIT,
    (90, 16): _SM80_16_BIT,
    (80, 32): _FP32,
    (86, 32): _FP32,
    (90, 32): _FP32,
}


def architecture(device: torch.device) -> int:
    """The row of the table: chips with the shared memory of sm_80, sm_90 or (all others) sm_86."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 80 if (major, minor) == (8, 0) else 90 if major in (9, 10) else 86


def padded(D: int) -> int:
    return max(32, 1 << (D - 1).bit_length())


def shipped(kernel: str, arch: int, D: int, bits: int, block_size: int) -> Config:
    """The default for a kernel, its tiles made to divide a window block where 64 does."""
    config = DEFAULTS[arch, bits][padded(D)][KERNELS.index(kernel)]
    return fit(kernel, config, block_size)


def fit(kernel: str, config: Config, block_size: int) -> Config:
    """A tile of queries inside one window block needs no mask at the window's start; nor one of keys."""
    if kernel in ("fwd", "dq") and config.block_m > 64 and block_size % config.block_m:
        return replace(config, block_m=64, num_warps=4)
    if kernel == "dkv" and config.block_n > 64 and block_size % config.block_n:
        return replace(config, block_n=64, num_warps=4)
    return config


def choose(
    kernel: str,
    device: torch.device,
    D: int,
    dtype: torch.dtype,
    block_size: int,
    launch: Callable[[Config], None],
) -> Config:
    """The configuration to launch ``kernel`` with; ``launch`` is called only to tune."""
    bits = 32 if dtype == torch.float32 else 16
    if AUTOTUNE and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return _tuned(kernel, device, D, bits, block_size, launch)
    return shipped(kernel, architecture(device), D, bits, block_size)
