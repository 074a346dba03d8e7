# SPDX-License-Identifier: Apache-2.0
"""Calls the kernels of probe.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tests.emulation import emulated_cuda


def _run(name: str, *arguments: Tensor | int) -> None:
    function = getattr(ctypes.CDLL(str(emulated_cuda().__file__)), f"probe_run_{name}")
    function.restype = ctypes.c_char_p
    message = function(
        *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments)
    ).decode()
    if message:
        raise RuntimeError(message)


def _matrix(*shape: int) -> Tensor:
    """NaN, at a multiple of 32 bytes as wmma wants it."""
    n = int(torch.tensor(shape).prod())
    flat = torch.full((n + 16,), torch.nan)
    skip = -flat.data_ptr() % 64 // 4
    return flat[skip : skip + n].view(shape)


def product(a: Tensor, b: Tensor) -> Tensor:
    c = _matrix(16, 16)
    _run("product", a, b, c)
    return c


def places() -> Tensor:
    numbers, out = _matrix(16, 16), _matrix(256)
    numbers.copy_(torch.arange(256).view(16, 16))
    _run("places", numbers, out)
    return out


def write(x: Tensor, index: int) -> None:
    _run("write", x, index)


def miss_a_barrier() -> None:
    _run("barrier")


def shuffle_half_a_warp() -> None:
    _run("shuffle")


def misaligned() -> None:
    _run("misaligned", _matrix(20, 16))


def fresh_shared(n: int) -> Tensor:
    out = torch.zeros(n)
    _run("shared", out, n, 4 * n)
    return out


def shared_past_the_end() -> None:
    _run("shared", torch.zeros(256), 256, 512)


def race() -> Tensor:
    out = torch.zeros(64)
    _run("race", out)
    return out
