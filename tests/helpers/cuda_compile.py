# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA kernels for NVIDIA chips on a machine that has none, and reads what they use.

By NVRTC 12.9, the last to know sm_70 (pip packages nvidia-cuda-nvrtc-cu12 and, for their headers,
nvidia-cuda-runtime-cu12 and nvidia-cuda-nvcc-cu12). Kernels must lie in .cuh files without host code.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# Dynamic shared memory that one block may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_MEMORY_LIMIT = {70: 96 * 1024, 75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}

# NVRTC has no C++ library; of it the kernels want these names only.
_CSTDINT = b"""
#pragma once
using int8_t = signed char; using int16_t = short; using int32_t = int; using int64_t = long long;
using uint8_t = unsigned char; using uint16_t = unsigned short; using uint32_t = unsigned;
using uint64_t = unsigned long long; using uintptr_t = unsigned long long;
#define INFINITY __int_as_float(0x7f800000)
"""


@dataclass(frozen=True)
class Report:
    registers: int
    waits: bool  # ptxas makes products of a warpgroup wait where the source does not (its messages C75xx)
    spills: int  # bytes stored and loaded
    shared: int  # bytes, static


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(root, name)).exists():
            return path
    return None


def why_not() -> str:
    """The reason why ``compile_kernels`` cannot run here; empty when it can."""
    if missing := [name for name in ("nvrtc", "runtime", "nvcc") if _package(f"cuda_{name}") is None]:
        return " ".join(["needs", *(f"nvidia-cuda-{name}-cu12==12.9.*" for name in missing)])
    return ""


def compile_kernels(source: str, kernels: list[str], arch: int | str) -> dict[str, Report]:
    """A report for each of ``kernels``: names that ``source`` knows, with template arguments."""
    packages = [_package(f"cuda_{name}") for name in ("nvrtc", "runtime", "nvcc")]
    folders = [path for path in packages if path is not None]
    nvrtc = ctypes.CDLL(str(folders[0] / "lib" / "libnvrtc.so.12"))
    program = ctypes.c_void_p()
    headers, names = (ctypes.c_char_p * 1)(_CSTDINT), (ctypes.c_char_p * 1)(b"cstdint")
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernels.cu", 1, headers, names
    )
    assert created == 0
    for kernel in kernels:
        assert nvrtc.nvrtcAddNameExpression(program, kernel.encode()) == 0
    options = [
        f"--gpu-architecture=sm_{arch}",
        "--std=c++17",
        "--ptxas-options=-v",
        "--device-as-default-execution-space",
        f"-I{CSRC}",
        *(f"-I{folder / 'include'}" for folder in folders[1:]),
    ]
    encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    used = log.value.decode()
    assert status == 0, used[-4000:]
    reports = {}
    for kernel in kernels:
        lowered = ctypes.c_char_p()
        assert nvrtc.nvrtcGetLoweredName(program, kernel.encode(), ctypes.byref(lowered)) == 0
        assert lowered.value is not None
        reports[kernel] = _report(used, lowered.value.decode())
    cubin_size = ctypes.c_size_t()
    assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(cubin_size)) == 0 and cubin_size.value > 0
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return reports


def _report(log: str, name: str) -> Report:
    part = log.split(f"Compiling entry function '{name}'")[1].split("Compiling entry function")[0]
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
    registers = int(re.search(r"Used (\d+) registers", part).group(1))  # type: ignore[union-attr]
    shared = re.search(r"(\d+) bytes smem", part)
    waits = any(name in line for line in re.findall(r".*\(C75\d\d\).*", log))
    return Report(registers, waits, spills, int(shared.group(1)) if shared else 0)
