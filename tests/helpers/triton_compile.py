# SPDX-License-Identifier: Apache-2.0
"""Compiles Triton kernels for NVIDIA chips on a machine that has none, and reads what they use.

A test process runs Triton's interpreter, in which ``triton.jit`` compiles nothing, so the compiler runs in a
process of its own: ``compile_kernels(specs)`` starts it once for a list of specs and returns a report each.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# What one block may use (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Spec:
    """One kernel at one configuration. ``signature``: argument name to Triton type, in order ("*fp16", "i32",
    "fp32", "constexpr"); ``constexprs``: values of those marked so."""

    module: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    arch: int
    num_warps: int = 4
    num_stages: int = 3
    # Pointers and strides that the launcher always passes as multiples of 16.
    aligned: list[str] = field(default_factory=list)
    maxnreg: int | None = None


def norm_spec(
    module: str, kernel: str, signature: dict[str, str], constexprs: dict[str, Any], arch: int
) -> Spec:
    """Of a LayerNorm kernel; ``constexprs``: those of the kernel and what ``rows_triton.tiling`` gives."""
    constexprs = dict(constexprs)
    warps, maxnreg = constexprs.pop("num_warps"), constexprs.pop("maxnreg")
    aligned = [name for name, kind in signature.items() if kind[0] == "*"]
    signature = signature | dict.fromkeys(constexprs, "constexpr")
    return Spec(module, kernel, signature, constexprs, arch, warps, aligned=aligned, maxnreg=maxnreg)


def assert_norms_fit(specs: list[Spec]) -> None:
    """They compile without spills, within their registers and the smallest chip's shared memory."""
    for spec, report in zip(specs, compile_kernels(specs), strict=True):
        assert report.spills == 0, (spec, report.spills)
        assert report.registers <= (spec.maxnreg or 0), (spec, report.registers)
        assert report.shared <= SHARED_MEMORY_LIMIT[86], (spec, report.shared)


@dataclass(frozen=True)
class Report:
    registers: int
    spills: int  # bytes stored and loaded
    shared: int  # bytes
    matrix_instructions: list[str]  # of "wgmma", "mma"
    ptx: str


def compile_kernels(specs: list[Spec]) -> list[Report]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.triton_compile"],
        input=json.dumps([asdict(s) for s in specs]),
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
    )
    assert done.returncode == 0, f"compilation failed:\n{done.stderr[-4000:]}"
    return [Report(**r) for r in json.loads(done.stdout.splitlines()[-1])]


def _compile(spec: Spec) -> Report:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(spec.module), spec.kernel)
    names = list(spec.signature)
    source = ASTSource(
        fn=kernel,
        signature=spec.signature,
        constexprs={(names.index(name),): value for name, value in spec.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "maxnreg": spec.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", spec.arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    used = _ptxas(ptx, spec.arch)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", used))
    registers = int(re.search(r"Used (\d+) registers", used).group(1))  # type: ignore[union-attr]
    matrix = [name for name in ("wgmma", "mma") if re.search(rf"^\s*{name}\.", ptx, re.MULTILINE)]
    return Report(registers, spills, compiled.metadata.shared, matrix, ptx)


def _ptxas(ptx: str, arch: int) -> str:
    """What ptxas -v prints; the ptxas is the one for which Triton wrote the PTX."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        target = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"-arch={target}", str(path), "-o", str(path) + ".cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


if __name__ == "__main__":
    reports = [_compile(Spec(**s)) for s in json.load(sys.stdin)]
    print(json.dumps([asdict(r) for r in reports]))
