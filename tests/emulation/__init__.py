# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels of csrc/ on a machine without a GPU.

``emulated_cuda()`` compiles ``csrc/bindings.cpp`` and every ``csrc/<op>/*_cuda.cu`` and ``*_sm90.cu`` with
the C++ compiler against ``cuda_emulation.h`` (and the headers of ``include/``, which stand in for CUDA's, and
``wgmma.cuh``, which stands in for the instructions of Hopper) into a module like
``cogview_kernels._C``; the fixture ``emulation`` of tests/conftest.py puts it in the extension's place, so
that ``backend="cuda"`` serves CPU tensors, launcher, bindings and all. Beforehand two constructs that C++
lacks are rewritten: ``kernel<<<...>>>(...)`` and ``extern __shared__ T name[];``.

What it finds, beside wrong results:

- accesses past the end of dynamic shared memory, or of a tensor made by ``guarded``: both end at a page that
  may not be touched. Either begins as NaN, so what is read before it is written shows too;
- barriers that some threads miss (deadlock), warp functions after some lanes have left, traps;
- races, as results that change with ``configure(order=seed)``, which shuffles threads and blocks;
- a kernel that relies on where a wmma fragment keeps an element: ``configure(fragment_layout=...)`` has
  Volta's places, Ampere's, and places without any pattern;
- misaligned wmma pointers, more shared memory than was asked for or than the chip has.

What it cannot find: memory ordering among warps that run at once, bank conflicts, speed.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import mmap
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"

FLAGS = [
    *("-std=c++17", "-march=native", "-fPIC", "-fvisibility=hidden", "-w"),
    # longjmp between stacks is how coroutines switch; the checked one would call it an error.
    *("-U_FORTIFY_SOURCE", "-fno-stack-protector", "-DCOGVIEW_X86=0"),
    *("-DCOGVIEW_HAS_CUDA=1", "-DCOGVIEW_HAS_SM90=1"),
    # Kernels read vectors through pointers of other types, as CUDA allows.
    "-fno-strict-aliasing",
]

# Headers of csrc/ that files of this folder replace.
STAND_INS = ("isa.h", "wgmma.cuh")

_LAUNCH = re.compile(r"(\b\w+(?:<[^<>;(){}]*>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)
_SHARED = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?([\w:\s]+?)\s+(\w+)\[\];")


def rewrite(source: str) -> str:
    """C++ from CUDA C++: launches become calls, dynamic shared memory a pointer."""
    source = _LAUNCH.sub(r'::emulation::Launch("\1", \1, \2)(', source)
    return _SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(::emulation::state.shared);", source)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _compile(folder: Path) -> Path:
    """Compiles what changed since the last call; ``folder`` keeps sources, objects and modules."""
    import pybind11

    cxx = os.environ.get("CXX", "g++")
    sources, headers = folder / "csrc", []
    if sources.exists():
        shutil.rmtree(sources)
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            target = sources / path.relative_to(CSRC)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = (HERE / path.name if path.name in STAND_INS else path).read_text()
            target.write_text(rewrite(text))
            if path.suffix in (".h", ".cuh"):
                headers.append(text)
    probe = sources / "probe.cu"
    probe.write_text(rewrite((HERE / "probe.cu").read_text()))
    units = [
        sources / "bindings.cpp",
        *(sources / "common" / f for f in ("parallel.cpp", "workspace.cpp")),
        HERE / "control.cpp",
        probe,
    ]
    units += sorted([*sources.glob("*/*_cuda.cu"), *sources.glob("*/*_sm90.cu")])
    # What an op shares between its parts; the CPU part and its choice of instruction set stay out.
    shared = (path for path in sources.glob("*/*.cpp") if path.parent.name != "common")
    units += sorted(path for path in shared if not path.stem.endswith("_cpu"))
    include = [
        *(f"-I{sources}", f"-I{HERE / 'include'}", f"-I{HERE}"),
        *(f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"),
    ]
    common = _digest(cxx, *FLAGS, *include, *headers, (HERE / "cuda_emulation.h").read_text())

    def build(unit: Path) -> Path:
        # Tensors of tests are small: to optimise more would take longer than it saves.
        flags = ["-O0" if unit.suffix == ".cpp" else "-O1"]
        target = folder / f"{unit.stem}.{_digest(common, unit.read_text())}.o"
        if not target.exists():
            command = [cxx, *FLAGS, *flags, *include, "-x", "c++", "-c", str(unit), "-o", f"{target}.part"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-6000:]}")
            os.replace(f"{target}.part", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, units))
    module = folder / f"_C.{_digest(*map(str, objects))}.so"
    if not module.exists():
        for stale in folder.glob("_C.*.so"):
            stale.unlink()
        command = [cxx, "-shared", "-pthread", "-o", f"{module}.part", *map(str, objects), "-ldl"]
        subprocess.run(command, check=True)
        os.replace(f"{module}.part", module)
    return module


@functools.cache
def emulated_cuda() -> ModuleType:
    """The module, compiled where sources changed."""
    folder = ROOT / "build" / f"emulation-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = str(_compile(folder))
        loader = importlib.machinery.ExtensionFileLoader("_C", path)
        spec = importlib.util.spec_from_file_location("_C", path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    return module


def configure(*, order: int = 0, fragment_layout: int = 0, shared_limit: int = 96 * 1024) -> None:
    """How the following launches run; see the head of this file."""
    library = ctypes.CDLL(str(emulated_cuda().__file__))
    library.emulation_configure(ctypes.c_uint(order), fragment_layout, shared_limit)


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` with its strides, whose last element ends at a page that may not be touched.

    Its last dimension's stride is 1 and it is not empty. 16 bytes of alignment are kept.
    """
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    size = span * x.element_size()
    padded = -(-size // 16) * 16
    pages = -(-padded // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, 0)
    flat = torch.frombuffer(memory, dtype=x.dtype, count=span, offset=pages - padded)
    if x.dtype.is_floating_point:
        flat.fill_(torch.nan)
    return flat.as_strided(x.shape, x.stride()).copy_(x)
