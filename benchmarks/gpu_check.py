# SPDX-License-Identifier: Apache-2.0
"""``make gpu-check OUT=folder``: builds, tests and measures everything on a machine with an NVIDIA GPU.

Needs only what is installed (PyTorch, Triton, nvcc, ninja, pybind11, pytest, pytest-benchmark, matplotlib,
tqdm), no network, and at most nine minutes. Each stage has a limit; benchmarks get what the tests leave and
are cut short in order of importance. Exit status 0: the build and every test passed.

The stages, any of which can be asked for alone with ``--stages``: build; tests; bench; old-ptx, where the
CUDA C++ kernels are built for a V100 (a T4 where the nvcc no longer can) and this GPU's driver compiles that
PTX; memcheck and racecheck, compute-sanitizer over Triton and CUDA kernels on tiny shapes.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import OPS

ROOT = Path(__file__).resolve().parent.parent
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

    To be run in ROOT/build: where setup.py finds no pyproject.toml, a setuptools too old for it will do.
    """
    folders = ("--build-lib", str(lib), "--build-temp", str(ROOT / "build" / objects))
    return [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", *folders]


class Check:
    def __init__(
        self,
        out: Path,
        *,
        budget: float,
        rehearse: bool,
        ops: list[str],
        select: str | None,
        stages: Sequence[str] = STAGES,
    ) -> None:
        self.out, self.budget, self.rehearse, self.ops, self.wanted = out, budget, rehearse, ops, stages
        self.select = ["-k", select] if select else []
        self.started = time.monotonic()
        self.stages: list[dict[str, Any]] = []
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        if rehearse:
            self.env["TRITON_INTERPRET"] = "1"

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.started)

    def stage(
        self,
        name: str,
        command: list[str],
        log: str,
        limit: float,
        *,
        env: dict[str, str] | None = None,
        may_be_late: bool = False,
        ok: tuple[int, ...] = (0,),
        cwd: Path = ROOT,
    ) -> None:
        """Runs ``command`` within ``limit`` seconds and the budget; its output is appended to ``log``."""
        limit = min(limit, self.left())
        begin = time.monotonic()
        if limit < SHORTEST_S:
            self.note(name, "left out: out of time", good=may_be_late)
            return
        print(f"[gpu-check] {name} (at most {limit:.0f} s)", flush=True)
        with open(self.out / log, "ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                command,
                cwd=cwd,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**self.env, **(env or {})},
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                self._stop(process)
                self.note(name, "out of time", may_be_late, time.monotonic() - begin)
                return
        outcome = "passed" if code in ok else f"FAILED (exit status {code})"
        self.note(name, outcome, code in ok, time.monotonic() - begin)
        if code not in ok:
            print("\n".join((self.out / log).read_text(errors="replace").splitlines()[-25:]), flush=True)

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
        self.stage("build", command, "build.log", BUILD_S, env=env, cwd=ROOT / "build")

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

    def test(self) -> None:
        every = self.ops == list(OPS)
        kernels = ROOT / "tests" / "kernels"
        files = [str(path) for op in self.ops for path in sorted(kernels.glob(f"test_{op}*.py"))]
        folder = [str(kernels)] if every else files
        options = ["-q", "-ra", "-p", "no:cacheprovider", *self.select]
        workers, env = self.workers()
        pytest = [sys.executable, "-m", "pytest", *options, *workers]
        end = time.monotonic() + TESTS_S
        report = f"--junitxml={self.out / 'tests.xml'}"
        self.stage("tests of the kernels", [*pytest, report, *folder], "tests.log", TESTS_S, env=env)
        if every:
            # Exit status 5: no test outside the kernels asks for a GPU.
            rest = [*pytest, "-m", "gpu", "--ignore=tests/kernels", "tests"]
            self.stage("other GPU tests", rest, "tests.log", end - time.monotonic(), env=env, ok=(0, 5))

    def bench(self) -> dict[str, Any]:
        from benchmarks.__main__ import command

        report, folder = self.out / "tests.xml", self.out / "results.part"
        collected: dict[str, Any] = {}
        if "tests" in self.wanted and not report.exists():
            self.note("benchmarks", "left out: the tests wrote no report", good=False)
            return collected
        options = [*self.tested(), "--device", "cpu" if self.rehearse else "cuda"]
        options += [*(["--tiny"] if self.rehearse else []), *self.select]
        after = {"old-ptx": OLD_PTX_S, "memcheck": SANITIZER_S, "racecheck": SANITIZER_S}
        reserve = 0 if self.rehearse else sum(after.get(name, 0) for name in self.wanted)
        for i, op in enumerate(self.ops):
            shares = [SHARES.get(name, 1) for name in self.ops[i:]]
            limit = (self.left() - reserve) * shares[0] / sum(shares)
            stop = ["--stop-after", f"{0.75 * limit:.0f}"]
            bench = command(op, folder, *options, *stop)
            self.stage(f"benchmark of {op}", bench, "bench.log", limit, may_be_late=True)
            for path in folder.glob(f"*/{op}.json"):
                collected[op] = json.loads(path.read_text())
                self.write("results.json", json.dumps(collected, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        return collected

    def tested(self) -> list[str]:
        """Benchmarks ask for the report of the tests, and run what passed; without one they run their own."""
        report = self.out / "tests.xml"
        return ["--tested", str(report)] if report.exists() else []

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
        self.stage(
            f"build for compute_{arch}",
            build_command(lib, "old-ptx-objects"),
            "build.log",
            OLD_PTX_S,
            env=env,
            may_be_late=True,
            cwd=ROOT / "build",
        )
        if self.stages[-1]["outcome"] != "passed":
            return
        workers, threads = self.workers()
        pytest = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", *workers]
        self.stage(
            f"CUDA attention from the PTX of compute_{arch}",
            [*pytest, "-o", f"pythonpath={lib} .", "tests/kernels/test_cuda_kernels.py"],
            "tests.log",
            end - time.monotonic(),
            env=env | threads,
            may_be_late=True,
        )

    def sanitize(self, check: str) -> None:
        from benchmarks.__main__ import bench_file

        tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if tool is None or self.rehearse:
            reason = "a rehearsal has no GPU" if self.rehearse else "compute-sanitizer is not installed"
            self.note(check, f"left out: {reason}", good=True)
            return
        pytest = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--tiny"]
        chosen = ["-k", "triton or cuda", *self.tested()]
        options = ["--error-exitcode", "99", "--target-processes", "all"]
        # Without PyTorch's cache every tensor is an allocation of its own, whose ends are watched.
        self.stage(
            check,
            [tool, "--tool", check, *options, *pytest, *chosen, *map(bench_file, self.ops)],
            "sanitizer.log",
            self.left() if check == self.wanted[-1] else self.left() - SANITIZER_S,
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            may_be_late=True,
        )

    def run(self, capability: list[int] | None) -> dict[str, Any]:
        """The wanted stages in order; gives what the benchmarks measured."""
        collected: dict[str, Any] = {}
        if "build" in self.wanted:
            self.build(capability)
        if "tests" in self.wanted:
            self.test()
        if "bench" in self.wanted:
            collected = self.bench()
        if "old-ptx" in self.wanted:
            self.old_ptx(capability)
        for check in ("memcheck", "racecheck"):
            if check in self.wanted:
                self.sanitize(check)
        return collected

    def write(self, name: str, text: str) -> None:
        aside = self.out / f"{name}.part"
        aside.write_text(text)
        os.replace(aside, self.out / name)

    def finish(self, collected: dict[str, Any], machine: str) -> int:
        from benchmarks import report

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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description="make gpu-check")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="only these")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these")
    parser.add_argument("--select", metavar="EXPRESSION", help="pytest's -k, for tests and benchmarks")
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
    check = Check(
        out,
        budget=arguments.budget,
        rehearse=rehearse,
        ops=arguments.ops,
        select=arguments.select,
        stages=[name for name in STAGES if name in arguments.stages],
    )
    if rehearse:
        gpu = {"name": "no GPU", "capability": None}
    return check.finish(check.run(gpu["capability"]), gpu["name"])


if __name__ == "__main__":
    sys.exit(main())
