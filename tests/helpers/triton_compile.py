# SPDX-License-Identifier: Apache-2.0
"""Compiles Triton kernels for NVIDIA chips on a machine that has none, and reads what they use.

A call of a public function on meta tensors goes the whole way that it would go on a GPU, up to a driver that
launches nothing. So Triton specialises and compiles the kernels that users get, and no test has to repeat
what a launcher passes. A test process runs Triton's interpreter, in which ``triton.jit`` compiles nothing, so
``compile_calls(calls)`` does this in a process of its own, which serves all tests of this one.

ptxas runs once for each kernel, inside Triton. What it prints is kept with the kernel in Triton's cache,
which is one of its own, in ``build``, since a kernel that Triton compiled elsewhere would come without.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
META = torch.device("meta")

# What one block may use (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
# An A100 and an H100.
_MULTIPROCESSORS = {80: 108, 90: 132}

# What decides on each chip. Products in float32 need no unit of the chip, so that both get the same PTX. The
# two dtypes of 16 bits share their tiles and differ in conversions; on sm_90, where registers are scarcest,
# either may be the first that spills. A GPU compiles all three (`make gpu-check`).
DECIDING = {80: (torch.bfloat16, torch.float32), 90: (torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Call:
    """Of the library's public function ``op``; its backward follows where a tensor requires a gradient."""

    op: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    arch: int
    tf32: bool = False


@dataclass(frozen=True)
class Report:
    """Of one kernel as Triton specialised it."""

    name: str
    arch: int
    constants: dict[str, Any]  # by parameter, those that Triton made so included (None, integers equal to 1)
    types: dict[str, str]  # of the other parameters
    options: dict[str, int | None]  # num_warps, maxnreg
    registers: int
    spills: int  # bytes stored and loaded
    shared: int  # bytes
    warnings: tuple[str, ...]  # ptxas's "Potential Performance Loss" by its numbers, as C7510
    matrix_instructions: list[str]  # of "wgmma", "mma"
    ptx: str = field(repr=False)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=grad)


def benchmark_calls(
    op: str, arch: int, dtypes: tuple[torch.dtype, ...] = (), **options: Any
) -> Iterator[Call]:
    """Those of every case that the benchmark of ``op`` has on a GPU in ``dtypes``, with ``options`` besides.

    By default the dtypes are those that decide on the chip.
    """
    from benchmarks.definitions import FORWARD, benchmark_of

    benchmark = benchmark_of(op)
    for case in benchmark.cases(torch.device("cuda"), False):
        if case.dtype not in (dtypes or DECIDING[arch]):
            continue
        inputs = benchmark.inputs(case, META)
        for name in inputs.leaves if case.direction != FORWARD else ():
            inputs.values[name].requires_grad_()
        yield benchmark.call(lambda *a, **given: Call(op, a, {**given, **options}, arch), inputs)


# Torch, Triton and the library are imported once for all calls; each call has a fork of its own, so that what
# it changes in them ends with it. The length of each message goes before it.
_SERVE = """
import os, pickle, sys, traceback
out = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what anybody prints
import torch, triton
import triton.backends.nvidia.compiler
import benchmarks.definitions, cogview_kernels, tests.helpers.triton_compile

def send(result, error):
    answer = pickle.dumps((result, error))
    out.write(len(answer).to_bytes(8, "little") + answer)
    out.flush()

while head := sys.stdin.buffer.read(8):
    asked = sys.stdin.buffer.read(int.from_bytes(head, "little"))
    if child := os.fork():
        if status := os.waitpid(child, 0)[1]:
            send(None, f"the process ended with status {status}")
        continue
    try:
        function, arguments = pickle.loads(asked)
        send(function(*arguments), "")
    except BaseException:
        send(None, traceback.format_exc())
    os._exit(0)
"""


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    """It ends with its input, which this process closes at its end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "COGVIEW_"))}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton")
    command = [sys.executable, "-c", _SERVE]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment
    )
    atexit.register(server.communicate)
    return server


def without_interpreter(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` gives in a process in which ``triton.jit`` compiles."""
    server, asked = _server(), pickle.dumps((function, arguments))
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(len(asked).to_bytes(8, "little") + asked)
    server.stdin.flush()
    head = server.stdout.read(8)
    assert len(head) == 8, "the process that compiles has ended"
    result, error = pickle.loads(server.stdout.read(int.from_bytes(head, "little")))
    assert not error, error[-4000:]
    return result


def compile_calls(calls: Iterable[Call]) -> list[Report]:
    """A report for each kernel that the calls launch, once for each way in which Triton compiles it."""
    return without_interpreter(_reports, list(calls))


def compile_launches(function: Callable[..., Any], arch: int, *arguments: Any) -> list[Report]:
    """A report for each kernel that a function of a module launches, which is no op of the library."""
    return without_interpreter(_reports_of, function, arch, arguments)


def assert_clean(reports: Iterable[Report], spills: Callable[[Report], int] = lambda report: 0) -> None:
    """No register is spilled, shared memory suffices, and ptxas warns of nothing that costs speed.

    ``spills``: the bytes that a kernel may spill. The warnings C7510, C7511 and C7515 say that matrix
    products of sm_90, which should overlap with what follows, are waited for one by one."""
    reports = list(reports)
    assert reports
    for report in reports:
        assert not report.warnings, report
        assert report.spills <= spills(report), report
        # What is compiled for sm_80 also serves sm_86, which has less.
        assert report.shared <= SHARED_MEMORY_LIMIT[86 if report.arch == 80 else report.arch], report


def assert_norms_fit(reports: Iterable[Report]) -> None:
    """Those of rows in registers: two rows of four tensors lie in the shared memory of any chip."""
    reports = list(reports)
    assert_clean(reports)
    for report in reports:
        assert report.shared <= SHARED_MEMORY_LIMIT[86], report


class Silent:
    """What Triton asks of a driver. Nothing is loaded or run; ``launched`` tells of each launch."""

    def __init__(self) -> None:
        self.arch, self.stream = 90, 0
        self.launched: list[tuple[Any, ...]] = []
        self.loaded = 0
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
            arguments = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in rest[3:]]
            self.launched.append((metadata.name, (x, y, z), stream, function, packed, *arguments))

        return launch

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY_LIMIT[self.arch], "warpSize": 32}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """Module, function, registers, spills and the most threads."""
        self.loaded += 1
        return 1, self.loaded, 0, 0, 1024

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps the kernels of each device, and here each chip, apart.

    def get_current_stream(self, _: int) -> int:
        return self.stream

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    @classmethod
    def activate(cls) -> Silent:
        """Makes it the driver of this process, which from then on takes any tensor for one on a GPU."""
        from triton.runtime import driver

        from cogview_kernels import _backends, _torch_ops

        silent = cls()
        driver.set_active(silent)
        _backends.why_not = lambda backend, device: "" if backend == "triton" else "not here"
        _torch_ops.Op._dispatch = _torch_ops.Op._on_its_device  # type: ignore[method-assign]
        _keep_what_ptxas_says()
        return silent

    def become(self, arch: int) -> None:
        from cogview_kernels import _device

        self.arch = arch
        _device.INTERPRETED = _device.Properties("a GPU", divmod(arch, 10), _MULTIPROCESSORS[arch])

    def run(self, call: Call) -> None:
        import cogview_kernels

        self.become(call.arch)
        torch.backends.cuda.matmul.fp32_precision = "tf32" if call.tf32 else "ieee"
        out = getattr(cogview_kernels, call.op)(*call.arguments, **call.options, backend="triton")
        outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None and x.requires_grad]
        if outs:
            torch.autograd.backward(outs, [torch.empty_like(x) for x in outs])


def _keep_what_ptxas_says() -> None:
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    make_cubin = CUDABackend.make_cubin

    def make_and_keep(backend: Any, source: str, metadata: dict[str, Any], *rest: Any) -> bytes:
        with contextlib.redirect_stdout(io.StringIO()) as log, knobs.nvidia.scope():
            knobs.nvidia.dump_ptxas_log = True
            cubin = make_cubin(backend, source, metadata, *rest)
        metadata["ptxas"] = log.getvalue()
        return cubin

    CUDABackend.make_cubin = make_and_keep


def _reports(calls: list[Call]) -> list[Report]:
    def run_all(silent: Silent) -> None:
        for call in calls:
            silent.run(call)

    return _watched(run_all)


def _reports_of(function: Callable[..., Any], arch: int, arguments: tuple[Any, ...]) -> list[Report]:
    def run_it(silent: Silent) -> None:
        silent.become(arch)
        function(*arguments)

    return _watched(run_it)


def _watched(launch: Callable[[Silent], None]) -> list[Report]:
    from triton.runtime.jit import JITFunction

    from cogview_kernels import _triton

    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def run_and_keep(function: Any, *arguments: Any, **options: Any) -> Any:
        kernel = run(function, *arguments, **options)
        kernels.setdefault(kernel.hash, kernel)
        return kernel

    silent = Silent.activate()
    JITFunction.run = run_and_keep
    # A plan that is kept would run kernels directly, unseen.
    _triton.Plans.get = lambda plans, key, *arguments: plans.make(*arguments)  # type: ignore[method-assign]
    launch(silent)
    return [_report(kernel) for kernel in kernels.values()]


def _report(kernel: Any) -> Report:
    log, ptx = kernel.metadata.ptxas, kernel.asm["ptx"]
    names = kernel.src.fn.arg_names
    return Report(
        name=kernel.metadata.name,
        arch=kernel.metadata.target.arch,
        constants={names[place[0]]: value for place, value in kernel.src.constants.items()},
        types={name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"},
        options={name: getattr(kernel.metadata, name) for name in ("num_warps", "maxnreg")},
        registers=int(re.search(r"Used (\d+) registers", log).group(1)),  # type: ignore[union-attr]
        spills=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        shared=kernel.metadata.shared,
        warnings=tuple(sorted(set(re.findall(r"\((C\d+)\) Potential Performance Loss", log)))),
        matrix_instructions=[n for n in ("wgmma", "mma") if re.search(rf"^\s*{n}\.", ptx, re.MULTILINE)],
        ptx=ptx,
    )
