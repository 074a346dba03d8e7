# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the Triton kernels: a table for each chip, and results of tuning kept on disk.

A first call does not tune: it takes the shipped table. With ``COGVIEW_KERNELS_AUTOTUNE=1`` the first call of
a kernel for a (GPU, version of Triton, head size, dtype, block size) times a few candidates on the tensors at
hand and keeps the winner in ``$COGVIEW_KERNELS_CACHE/three_region_attention.json`` (default
``~/.cache/cogview_kernels``), which later processes read under the same switch. Other tiles sum in another
order, so results differ in their last bits between configurations; under one configuration two runs give the
same bits.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from cogview_kernels import _device
from cogview_kernels._backends import is_switched_on

AUTOTUNE = is_switched_on("COGVIEW_KERNELS_AUTOTUNE")

# fwd, dq: BLOCK_M queries walk over BLOCK_N keys at a time; dkv (window), dkv_far (pivots): BLOCK_N keys walk
# over BLOCK_M queries at a time.
KERNELS = ("fwd", "dq", "dkv", "dkv_far")


# What one block may use.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    # Registers a thread: fewer where that lets one more block run on a processor, or more than are needed
    # where ptxas would spill some for the sake of another block.
    maxnreg: int | None = None

    def __str__(self) -> str:
        """As :func:`_row` reads it."""
        numbers = (self.block_m, self.block_n, self.num_warps, self.stages, self.maxnreg)
        return "/".join(str(number) for number in numbers if number is not None)


def _row(text: str) -> tuple[Config, ...]:
    """One Config a kernel, each ``block_m/block_n/num_warps/stages``, and ``/maxnreg`` where limited."""
    return tuple(Config(*map(int, numbers.split("/"))) for numbers in text.split())


# By (head size padded to a power of two, dropout): fwd, dq, dkv, dkv_far, for blocks that 128 divides. Chosen
# among what compiles without spills, narrower blocks included. Only head size 64 without dropout on sm_90 was
# timed on a GPU, and its fastest tiles spill a few registers.
_SM80_16_BIT = {
    (32, False): _row("128/64/4/3 128/64/8/3 32/128/8/2 16/64/4/3"),
    (32, True): _row("64/64/4/3 128/64/8/3 32/128/8/2 16/64/4/2"),
    (64, False): _row("128/64/4/3 64/64/8/3 32/128/8/2 16/64/4/3"),
    (64, True): _row("128/64/8/3 128/32/8/3 32/128/8/2 16/64/4/3"),
    (128, False): _row("128/32/8/3 64/32/4/2 32/64/8/2 32/64/8/2"),
    (128, True): _row("128/32/8/3 64/32/4/2 32/64/8/2 32/64/8/2"),
    (256, False): _row("64/32/8/1 64/32/8/1 16/64/8/1 16/32/8/1"),
    (256, True): _row("64/32/8/1 64/32/8/1 16/64/8/1 16/32/8/1"),
}
_SM90_16_BIT = {
    (32, False): _row("128/64/8/3/128 128/64/8/3/128 64/128/8/3 64/128/8/2"),
    (32, True): _row("64/64/4/3/168 64/64/4/3/168 64/128/8/3 64/128/8/2"),
    (64, False): _row("128/64/8/3/128 128/64/8/3/128 32/64/4/3/168 64/64/4/3"),
    (64, True): _row("64/64/4/3/168 128/64/8/3 64/128/8/3 64/128/8/2"),
    (128, False): _row("128/64/8/3 128/64/8/2 32/64/8/2 32/64/8/2"),
    (128, True): _row("128/64/8/3 128/64/8/2 32/64/8/2 32/64/8/2"),
    (256, False): _row("128/32/8/2 64/32/8/2 32/64/8/1 16/64/8/1"),
    (256, True): _row("128/32/8/2 64/32/8/2 16/64/8/1 16/64/8/1"),
}
_FP32 = {
    (32, False): _row("64/32/8/2 64/32/8/2 32/64/8/2 32/64/8/2"),
    (32, True): _row("64/32/8/2 64/32/8/2 32/64/8/2 32/64/8/2"),
    (64, False): _row("64/32/8/2 64/32/8/2 32/32/8/2 32/32/8/2/128"),
    (64, True): _row("64/32/8/2 64/32/8/2 32/32/8/2 32/32/8/2"),
    (128, False): _row("32/32/8/2 32/16/8/1 32/32/8/1 32/32/8/1"),
    (128, True): _row("32/32/8/2 32/32/8/1/255 32/32/8/1 32/32/8/1"),
    (256, False): _row("32/16/8/1/255 16/16/8/1/255 16/16/8/1/255 16/16/8/1/255"),
    (256, True): _row("32/16/8/1 16/16/8/1 16/16/8/1/255 16/16/8/1"),
}
# Without its limit dq of head size 128 spills under Triton 3.9; 3.7 runs two blocks either way.
_SM90_FP32 = {**_FP32, (128, False): _row("32/32/8/2 32/32/8/1/168 32/32/8/1/255 32/16/8/2/128")}
DEFAULTS = {
    (80, 16): _SM80_16_BIT,
    (86, 16): _SM80_16_BIT,
    (90, 16): _SM90_16_BIT,
    (80, 32): _FP32,
    (86, 32): _FP32,
    (90, 32): _SM90_FP32,
}


def architecture(device: torch.device) -> int:
    """The row of the table: chips with the shared memory of sm_80, sm_90 or (all others) sm_86."""
    major, minor = _device.capability(device)
    return 80 if (major, minor) == (8, 0) else 90 if major in (9, 10) else 86


def padded(D: int) -> int:
    return max(32, 1 << (D - 1).bit_length())


def shipped(kernel: str, arch: int, D: int, bits: int, block_size: int, dropout: bool) -> Config:
    """The default for a kernel, its tiles halved where that lets them divide a window block."""
    config = DEFAULTS[arch, bits][padded(D), dropout][KERNELS.index(kernel)]
    return fit(kernel, config, block_size)


def fit(kernel: str, config: Config, block_size: int) -> Config:
    """A tile of queries inside one window block needs no mask at the window's start; nor one of keys."""
    tile = config.block_n if kernel == "dkv" else config.block_m
    if kernel == "dkv_far" or tile <= 64 or block_size % tile == 0:
        return config
    half = replace(config, num_warps=max(4, config.num_warps // 2), maxnreg=168 if config.maxnreg else None)
    if kernel == "dkv":
        return replace(half, block_n=tile // 2, stages=min(2, config.stages))
    return replace(half, block_m=tile // 2)


def choose(
    kernel: str,
    device: torch.device,
    D: int,
    dtype: torch.dtype,
    block_size: int,
    dropout: bool,
    launch: Callable[[Config], None],
) -> Config:
    """The configuration to launch ``kernel`` with; ``launch`` runs only to be timed."""
    bits = 32 if dtype == torch.float32 else 16
    if AUTOTUNE and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return _tuned(kernel, device, D, bits, block_size, dropout, launch)
    return shipped(kernel, architecture(device), D, bits, block_size, dropout)


# ---- tuning


def cache_file() -> Path:
    folder = os.environ.get("COGVIEW_KERNELS_CACHE") or Path.home() / ".cache" / "cogview_kernels"
    return Path(folder) / "three_region_attention.json"


def candidates(kernel: str, arch: int, D: int, bits: int, block_size: int, dropout: bool) -> list[Config]:
    """What is worth timing: the default and its neighbours, at most 12; what does not fit is left out."""
    default = shipped(kernel, arch, D, bits, block_size, dropout)
    found = {default: None}
    for tile in (64, 128) if bits == 16 else (32, 64):
        for step in (32, 64) if bits == 16 else (16, 32):
            for stages in (2, 3):
                moves = (step, tile) if kernel.startswith("dkv") else (tile, step)
                config = Config(*moves, 8 if tile == 128 or bits == 32 else 4, stages)
                # Query side and a ring of key side tiles, two tensors each (one of queries in fwd).
                rows = tile * (1 if kernel == "fwd" else 2) + 2 * stages * step
                if rows * padded(D) * bits // 8 <= SHARED_MEMORY[arch]:
                    found[fit(kernel, config, block_size)] = None
    if kernel in ("fwd", "dq") and arch == 90 and bits == 16 and padded(D) <= 64:
        # Up to a seventh fewer instructions a key, with half the warps.
        wide = (Config(128, 64, 4, 3), Config(64, 128, 4, 3))
        for config in wide[: 2 if kernel == "fwd" else 1]:
            found[fit(kernel, config, block_size)] = None
    if default.maxnreg is None and bits == 16:
        found[replace(default, maxnreg=128 if default.num_warps == 8 else 168)] = None
    return list(found)[:12]


_memory: dict[str, Config] = {}


@functools.cache
def _compiler() -> str:
    """Triton's version: another one compiles the same tiles to other machine code."""
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "unknown"


def _key(kernel: str, device: torch.device, D: int, bits: int, block_size: int, dropout: bool) -> str:
    # Tiles depend on the window block by its factors alone.
    block = next(b for b in (128, 64, 1) if block_size % b == 0)
    made_by = f"{torch.cuda.get_device_name(device)}, triton {_compiler()}"
    return f"{made_by}/{kernel}/D{padded(D)}/{bits}/w{block}/dropout{int(dropout)}"


def _tuned(
    kernel: str,
    device: torch.device,
    D: int,
    bits: int,
    block_size: int,
    dropout: bool,
    launch: Callable[[Config], None],
) -> Config:
    key = _key(kernel, device, D, bits, block_size, dropout)
    if not _memory:
        _memory.update(_read())
    if key not in _memory:
        found = candidates(kernel, architecture(device), D, bits, block_size, dropout)
        times = {config: milliseconds(launch, config) for config in found}
        keep(kernel, device, D, bits, block_size, dropout, min(times, key=lambda c: times[c]))
    return _memory[key]


def keep(
    kernel: str, device: torch.device, D: int, bits: int, block_size: int, dropout: bool, config: Config
) -> None:
    """``config`` is what tuning found, for this process and, on disk, for later ones."""
    key = _key(kernel, device, D, bits, block_size, dropout)
    _memory[key] = config
    _write(key, config)


def fits(launch: Callable[[Config], None], config: Config) -> bool:
    """Launches once; False for what the chip has no room for."""
    try:
        launch(config)
    except Exception as error:
        if type(error).__name__ not in ("OutOfResources", "PTXASError"):
            raise
        return False
    return True


def milliseconds(launch: Callable[[Config], None], config: Config) -> float:
    """The median of 20 runs after 3; infinite for what the chip has no room for."""
    if not all(fits(launch, config) for _ in range(3)):
        return float("inf")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(20)]
    for start, stop in events:
        start.record()
        launch(config)
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[10]


def _read() -> dict[str, Config]:
    try:
        return {key: Config(**value) for key, value in json.loads(cache_file().read_text()).items()}
    except (OSError, RuntimeError, ValueError, TypeError):
        return {}  # none yet, no home to look in, or of another version


def _write(key: str, config: Config) -> None:
    """Adds one result; a whole new file replaces the old one, so that no reader sees half of it.

    A result that cannot be kept is a warning, as the call that tuned can go on with it.
    """
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        everything = {**_read(), key: config}
        part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        try:
            part.write_text(json.dumps({k: asdict(c) for k, c in sorted(everything.items())}, indent=1))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows the home
        warnings.warn(
            f"what tuning found is not kept for later processes: {error}; set COGVIEW_KERNELS_CACHE to a "
            "folder that can be written to",
            stacklevel=2,
        )
