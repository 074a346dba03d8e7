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
from collections.abc import Sequence
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
class Launch:
    """A call of a function that launches one kernel, which Triton then specialises as it would on a GPU.

    ``arguments``: numbers and None as they are, a tensor as ``{"shape": [2, 3], "dtype": "bfloat16"}``."""

    module: str
    function: str
    arguments: list[Any]
    arch: int


@dataclass(frozen=True)
class Report:
    registers: int
    spills: int  # bytes stored and loaded
    shared: int  # bytes
    matrix_instructions: list[str]  # of "wgmma", "mma"
    ptx: str


def compile_kernels(specs: Sequence[Spec | Launch]) -> list[Report]:
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
    return _report(
        triton.compile(source, target=GPUTarget("cuda", spec.arch, 32), options=options), spec.arch
    )


def _compile_launch(launch: Launch) -> Report:
    import importlib

    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Nothing:
        """What Triton asks of a driver; what it loads and launches is nothing."""

        utils: Any = None

        def __init__(self, *_: Any) -> None:
            self.utils = self

        def __call__(self, *_: Any) -> None:
            pass

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_MEMORY_LIMIT[launch.arch], "warpSize": 32}

        def load_binary(self, *_: Any) -> tuple[int, ...]:
            return 1, 1, 0, 0, 1024

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", launch.arch, 32)

    Nothing.launcher_cls = Nothing  # type: ignore[attr-defined]
    compiled = []
    compile_one = jit.JITFunction._do_compile

    def keep(*arguments: Any, **named: Any) -> Any:
        compiled.append(compile_one(*arguments, **named))
        return compiled[-1]

    def on_meta(argument: Any) -> Any:
        if not isinstance(argument, dict):
            return argument
        return torch.empty(argument["shape"], dtype=getattr(torch, argument["dtype"]), device="meta")

    function = getattr(importlib.import_module(launch.module), launch.function)
    driver.set_active(Nothing())
    # A kernel that an earlier launch compiled may serve this one too; the cache would then hide it.
    for kernel in vars(sys.modules[launch.module]).values():
        if isinstance(kernel, jit.JITFunction):
            kernel.device_caches.clear()
    jit.JITFunction._do_compile = keep
    try:
        function(*map(on_meta, launch.arguments))
    finally:
        jit.JITFunction._do_compile = compile_one
    (kernel,) = compiled
    return _report(kernel, launch.arch)


def _report(compiled: Any, arch: int) -> Report:
    ptx = compiled.asm["ptx"]
    used = _ptxas(ptx, arch)
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
    reports = [
        _compile_launch(Launch(**s)) if "function" in s else _compile(Spec(**s)) for s in json.load(sys.stdin)
    ]
    print(json.dumps([asdict(r) for r in reports]))
