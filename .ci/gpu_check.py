# SPDX-License-Identifier: Apache-2.0
"""``make gpu-check OUT=folder``: builds, tests and measures everything on a machine with an NVIDIA GPU.

It needs only what is installed (PyTorch, Triton, nvcc, ninja, pybind11, pytest, matplotlib, tabulate, tqdm),
no network, and at most nine minutes. Each stage has a limit; benchmarks get what the tests leave and are cut
short in order of importance. Exit status 0: the build and every test passed.

The stages, any of which can be asked for alone with ``--stages``:

- build, tests, bench;
- old-ptx: the CUDA C++ kernels are built for a V100 (a T4 where the nvcc no longer can), and this GPU's
  driver compiles that PTX;
- memcheck, racecheck: compute-sanitizer over Triton and CUDA kernels on tiny shapes.

In OUT: summary.txt, gpu-check.json, results.json (``python -m benchmarks.report --import`` takes it),
tests.xml and the logs. Without a GPU, GPU_CHECK_REHEARSE=1 runs the same stages on the CPU: Triton kernels in
the interpreter, tiny shapes, times that mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import OPS  # noqa: E402  (found by the line above: this file is run by its path)

BUDGET_S = 520
BUILD_S, TESTS_S, OLD_PTX_S, SANITIZER_S, SHORTEST_S = 150, 240, 75, 40, 5
STAGES = ("build", "tests", "bench", "old-ptx", "memcheck", "racecheck")
SHARES = {"three_region_attention": 6, "linear_cross_entropy": 2}  # of the benchmarks' time; others 1
LOG_BYTES = 8 << 20

PROBE = """
import json, torch
print(json.dumps({"name": torch.cuda.get_device_name(0), "capability": torch.cuda.get_device_capability(0)}
      if torch.cuda.is_available() else None))
"""


def build_command(lib: Path, objects: str) -> list[str]:
    """Compiles the extension into the package that lies in ``lib``; ``objects``: where, under ROOT/build.

    To be run in ROOT/build: a setuptools too old for pyproject.toml works where setup.py finds none.
    """
    folders = ("--build-lib", str(lib), "--build-temp", str(ROOT / "build" / objects))
    return [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", *folders]


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for. ``tests`` is pytest's -k, ``cases`` the benchmarks' --select."""

    budget: float = BUDGET_S
    rehearse: bool = False
    ops: tuple[str, ...] = OPS
    stages: tuple[str, ...] = STAGES
    tests: str = ""
    cases: str = ""


@dataclass(frozen=True)
class Stage:
    """A command with a time limit; its output is appended to ``log``. ``may_be_late``: no failure if cut."""

    name: str
    command: list[str]
    log: str
    limit: float
    env: dict[str, str] = field(default_factory=dict)
    may_be_late: bool = False
    ok: tuple[int, ...] = (0,)
    cwd: Path = ROOT


class Check:
    def __init__(self, out: Path, wishes: Wishes) -> None:
        self.out, self.wishes, self.rehearse = out, wishes, wishes.rehearse
        self.started = time.monotonic()
        self.stages: list[dict[str, Any]] = []
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        if self.rehearse:
            self.env["TRITON_INTERPRET"] = "1"

    def left(self) -> float:
        return self.wishes.budget - (time.monotonic() - self.started)

    def stage(self, stage: Stage) -> bool:
        """Runs the stage within its limit and the budget."""
        limit = min(stage.limit, self.left())
        begin = time.monotonic()
        if limit < SHORTEST_S:
            self.note(stage.name, "left out: out of time", good=stage.may_be_late)
            return False
        print(f"[gpu-check] {stage.name} (at most {limit:.0f} s)", flush=True)
        with open(self.out / stage.log, "ab") as file:
            file.write(f"$ {' '.join(stage.command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                stage.command,
                cwd=stage.cwd,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**self.env, **stage.env},
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                self._stop(process)
                self.note(stage.name, "out of time", stage.may_be_late, time.monotonic() - begin)
                return False
        good = code in stage.ok
        outcome = "passed" if good else f"FAILED (exit status {code})"
        self.note(stage.name, outcome, good, time.monotonic() - begin)
        if not good:
            print(
                "\n".join((self.out / stage.log).read_text(errors="replace").splitlines()[-25:]), flush=True
            )
        return good

    @staticmethod
    def _stop(process: subprocess.Popen) -> None:
        """Interrupts first: pytest then still writes its report."""
        for sent, wait in ((signal.SIGINT, 15), (signal.SIGKILL, 10)):
            try:
                os.killpg(process.pid, sent)
                process.wait(wait)
                return
            except (subprocess.TimeoutExpired, ProcessLookupError):
                continue

    def note(self, name: str, outcome: str, good: bool, seconds: float = 0.0) -> None:
        self.stages.append({"stage": name, "outcome": outcome, "good": good, "seconds": round(seconds, 1)})

    def build(self, capability: list[int] | None) -> None:
        env = {"MAX_JOBS": str(os.cpu_count() or 1)}
        if capability:
            env |= {"COGVIEW_CUDA": "1", "COGVIEW_CUDA_ARCHS": f"{capability[0]}{capability[1]}"}
        # Where `make build` has them, so that nothing is compiled twice.
        objects = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        command = build_command(ROOT, objects)
        self.stage(Stage("build", command, "build.log", BUILD_S, env, cwd=ROOT / "build"))

    @staticmethod
    def workers() -> tuple[list[str], dict[str, str]]:
        """Several processes and a limit per test, where the plugins for them are installed."""
        options, env = [], {}
        if importlib.util.find_spec("xdist"):
            cores = os.cpu_count() or 1
            processes = max(1, min(8, cores // 2))
            options += ["-n", str(processes)]
            # Each with all cores' threads would wait for the others more than compute.
            env["OMP_NUM_THREADS"] = str(max(1, cores // processes))
        if importlib.util.find_spec("pytest_timeout"):
            options += ["--timeout=150"]
        return options, env

    def pytest(self) -> list[str]:
        return [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider"]

    def test(self) -> None:
        every = self.wishes.ops == OPS
        kernels = ROOT / "tests" / "kernels"
        files = [str(path) for op in self.wishes.ops for path in sorted(kernels.glob(f"test_{op}*.py"))]
        folder = [str(kernels)] if every else files
        select = ["-k", self.wishes.tests] if self.wishes.tests else []
        workers, env = self.workers()
        pytest = [*self.pytest(), *select, *workers]
        end = time.monotonic() + TESTS_S
        xml = f"--junitxml={self.out / 'tests.xml'}"
        self.stage(Stage("tests of the kernels", [*pytest, xml, *folder], "tests.log", TESTS_S, env))
        if every:
            # Exit status 5: no test outside the kernels asks for a GPU.
            rest = [*pytest, "-m", "gpu", "--ignore=tests/kernels", "tests"]
            limit = end - time.monotonic()
            self.stage(Stage("other GPU tests", rest, "tests.log", limit, env, ok=(0, 5)))

    def benchmarks(self, folder: Path, *options: str) -> list[str]:
        """``python -m benchmarks`` with the outcome of the tests, where they were run."""
        tests = self.out / "tests.xml"
        tested = ["--tested", str(tests)] if tests.exists() else []
        return [sys.executable, "-m", "benchmarks", "--save", str(folder), *tested, *options]

    def bench(self) -> dict[str, Any]:
        folder = self.out / "results.part"
        collected: dict[str, Any] = {}
        if "tests" in self.wishes.stages and not (self.out / "tests.xml").exists():
            self.note("benchmarks", "left out: the tests wrote no report", good=False)
            return collected
        options = ["--select", self.wishes.cases, "--device", "cpu" if self.rehearse else "cuda"]
        options += ["--tiny"] if self.rehearse else []
        after = {"old-ptx": OLD_PTX_S, "memcheck": SANITIZER_S, "racecheck": SANITIZER_S}
        reserve = 0 if self.rehearse else sum(after.get(name, 0) for name in self.wishes.stages)
        ops = self.wishes.ops
        for i, op in enumerate(ops):
            shares = [SHARES.get(name, 1) for name in ops[i:]]
            limit = (self.left() - reserve) * shares[0] / sum(shares)
            # A process for each op: an error that the GPU does not recover from ends only that op.
            command = self.benchmarks(folder, *options, "--stop-after", f"{0.75 * limit:.0f}", op)
            self.stage(Stage(f"benchmark of {op}", command, "bench.log", limit, may_be_late=True))
            for path in folder.glob(f"*/{op}.json"):
                collected[op] = json.loads(path.read_text())
                self.write("results.json", json.dumps(collected, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        return collected

    def old_ptx(self, capability: list[int] | None) -> None:
        nvcc = shutil.which("nvcc")
        if nvcc is None or capability is None:
            reason = "a rehearsal has no GPU" if self.rehearse else "there is no nvcc"
            self.note("old PTX", f"left out: {reason}", good=True)
            return
        # Without CUDA_FORCE_PTX_JIT, which PyTorch's own kernels would not survive: ours have only PTX here.
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        arch = "70" if "compute_70" in listed else "75"
        end = time.monotonic() + OLD_PTX_S
        env = {
            "MAX_JOBS": str(os.cpu_count() or 1),
            "COGVIEW_CUDA": "1",
            "COGVIEW_CUDA_ARCHS": arch,
        }
        lib = ROOT / "build" / "old-ptx"
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "cogview_kernels", lib / "cogview_kernels", ignore=ignore, dirs_exist_ok=True)
        build = build_command(lib, "old-ptx-objects")
        name, cwd = f"build for compute_{arch}", ROOT / "build"
        if not self.stage(Stage(name, build, "build.log", OLD_PTX_S, env, may_be_late=True, cwd=cwd)):
            return
        workers, threads = self.workers()
        tests = ["-o", f"pythonpath={lib} .", "tests/kernels/test_cuda_kernels.py"]
        name, limit = f"CUDA attention from the PTX of compute_{arch}", end - time.monotonic()
        command = [*self.pytest(), *workers, *tests]
        self.stage(Stage(name, command, "tests.log", limit, env | threads, may_be_late=True))

    def sanitize(self, check: str) -> None:
        tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if tool is None or self.rehearse:
            reason = "a rehearsal has no GPU" if self.rehearse else "compute-sanitizer is not installed"
            self.note(check, f"left out: {reason}", good=True)
            return
        folder = ROOT / "build" / "sanitizer"
        command = [tool, "--tool", check, "--error-exitcode", "99", "--target-processes", "all"]
        command += self.benchmarks(folder, "--tiny", "--select", "triton|cuda", *self.wishes.ops)
        limit = self.left() if check == self.wishes.stages[-1] else self.left() - SANITIZER_S
        # Without PyTorch's cache every tensor is an allocation of its own, whose ends are watched.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        self.stage(Stage(check, command, "sanitizer.log", limit, env, may_be_late=True))

    def run(self, capability: list[int] | None) -> dict[str, Any]:
        """The wanted stages in order; gives what the benchmarks measured."""
        collected: dict[str, Any] = {}
        if "build" in self.wishes.stages:
            self.build(capability)
        if "tests" in self.wishes.stages:
            self.test()
        if "bench" in self.wishes.stages:
            collected = self.bench()
        if "old-ptx" in self.wishes.stages:
            self.old_ptx(capability)
        for check in ("memcheck", "racecheck"):
            if check in self.wishes.stages:
                self.sanitize(check)
        return collected

    def write(self, name: str, text: str) -> None:
        aside = self.out / f"{name}.part"
        aside.write_text(text)
        os.replace(aside, self.out / name)

    def finish(self, collected: dict[str, Any], machine: str) -> int:
        from benchmarks import report  # PyTorch is imported here, after everything was measured

        good = all(stage["good"] for stage in self.stages)
        stages = "\n".join(f"  {s['stage']:<36} {s['seconds']:>6.1f} s  {s['outcome']}" for s in self.stages)
        lines = [report.text_table(document) for document in collected.values()]
        short = [line for document in collected.values() for line in report.short_lines(document)]
        rehearsal = " (a rehearsal on the CPU: the times mean nothing)" if self.rehearse else ""
        verdict = f"gpu-check on {machine}{rehearsal}: {'passed' if good else 'FAILED'}"
        ending = "\n".join(["", *short, "", stages, "", verdict])
        self.write("summary.txt", "\n".join(lines) + ending + "\n")
        self.write("gpu-check.json", json.dumps({"passed": good, "stages": self.stages}, indent=1))
        for path in self.out.glob("*.log"):
            if path.stat().st_size > LOG_BYTES:
                path.write_bytes(path.read_bytes()[-LOG_BYTES:])
        print(ending, flush=True)
        return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog=".ci/gpu_check.py", description="make gpu-check")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="only these")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these")
    parser.add_argument("--tests", default="", metavar="EXPRESSION", help="only these tests: pytest's -k")
    parser.add_argument(
        "--cases", default="", metavar="REGEX", help="only these cases: the benchmarks' --select"
    )
    arguments = parser.parse_args()
    rehearse = os.environ.get("GPU_CHECK_REHEARSE", "0") not in ("", "0")
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    lines = probe.stdout.strip().splitlines()
    gpu = json.loads(lines[-1]) if probe.returncode == 0 and lines else None
    if gpu is None and not rehearse:
        error = probe.stderr.strip().splitlines()
        why = f" ({error[-1]})" if probe.returncode and error else ""
        print(f"gpu-check: no NVIDIA GPU answers here{why}; GPU_CHECK_REHEARSE=1 rehearses on the CPU")
        return 1
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for path in (*out.glob("*.log"), out / "results.json"):
        path.unlink(missing_ok=True)
    if "tests" in arguments.stages:
        (out / "tests.xml").unlink(missing_ok=True)
    (ROOT / "build").mkdir(exist_ok=True)
    wishes = Wishes(
        budget=arguments.budget,
        rehearse=rehearse,
        ops=tuple(arguments.ops),
        stages=tuple(name for name in STAGES if name in arguments.stages),
        tests=arguments.tests,
        cases=arguments.cases,
    )
    check = Check(out, wishes)
    if rehearse:
        gpu = {"name": "no GPU", "capability": None}
    return check.finish(check.run(gpu["capability"]), gpu["name"])


if __name__ == "__main__":
    sys.exit(main())
