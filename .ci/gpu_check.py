# SPDX-License-Identifier: Apache-2.0
"""``make gpu-check TIER=quick|full|deep OUT=folder``: one command for a machine with an NVIDIA GPU.

Each tier is complete in itself and begins with the build, beside which other processes compile the Triton
kernels that come next:

- quick, at most 170 s: headlines, that is whether attention is right, then the figures that matter most;
- full, at most 380 s: the tests that need a GPU, tiles tuned for the shape ``paper``, and headlines with the
  rivals that must be compiled;
- deep, at most 480 s: profiler counters of the attention kernels, compute-sanitizer's memcheck, generation
  and a training step of the preset ``base``, and the CUDA C++ kernels built for a V100 (a T4 where the nvcc
  no longer can), whose PTX this GPU's driver compiles and tests run.

``--stages`` asks for single stages instead, also for ``racecheck``, which no tier has. It needs only what is
installed (PyTorch, Triton, nvcc, ninja, pybind11, pytest, matplotlib, tabulate, tqdm) and no network. Every
stage has a limit and writes down what it finds line by line, so a run that is cut keeps what was done. Exit
status 0: nothing failed; a stage that a tier can do without may be late.

In OUT, at most eight files: summary.txt, results.json (``python -m benchmarks.report --import`` takes it, of
ops that are green in tests.xml), tests.xml, tuned.txt, build.log, tests.log (each test's outcome as it comes)
and run.log; of a whole model generate/*.json and training_step.json in a folder named for the device, to be
copied. Without a GPU, GPU_CHECK_REHEARSE=1 runs the same stages on the CPU: Triton kernels in the
interpreter, tiny shapes, few tests, times that mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import OPS  # noqa: E402  (found by the line above: this file is run by its path)

BUDGETS = {"quick": 170, "full": 380, "deep": 480}
TIERS = {
    "quick": ("build", "headlines"),
    "full": ("build", "tests", "tune", "rivals"),
    "deep": ("build", "counters", "memcheck", "model", "old-ptx"),
}
STAGES = (*dict.fromkeys(stage for tier in TIERS.values() for stage in tier), "racecheck")
FILES = ("summary.txt", "results.json", "tests.xml", "tuned.txt", "build.log", "tests.log", "run.log")
FINISH_S = 8  # for the summary, which imports PyTorch
SHORTEST_S = 5
LOG_BYTES = 8 << 20
CORES = len(os.sched_getaffinity(0))
# Compiling alone, and what a CPU runs, was tested without a GPU.
TESTS = "(triton or cuda or gpu or counters) and not compil and not tune"
REHEARSED_TESTS = "test_empty and triton"
LARGEST = r"regex:^(fwd|dq|dkv|dkv_far|three_region_attention_fwd_sm90)_kernel"
SECTIONS = ("SpeedOfLight", "WarpStateStats", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis")

PROBE = """
import json, torch
print(json.dumps({"name": torch.cuda.get_device_name(0), "capability": torch.cuda.get_device_capability(0)}
      if torch.cuda.is_available() else None))
"""


def module(name: str, *options: str) -> list[str]:
    return [sys.executable, "-m", name, *options]


def build_command(lib: Path, objects: str) -> list[str]:
    """Compiles the extension into the package that lies in ``lib``; ``objects``: where, under ROOT/build.

    To be run in ROOT/build: a setuptools too old for pyproject.toml works where setup.py finds none.
    """
    folders = ("--build-lib", str(lib), "--build-temp", str(ROOT / "build" / objects))
    return [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", *folders]


def pytest_command() -> tuple[list[str], dict[str, str]]:
    """Prints each test's outcome as it comes; several processes and a limit a test, where plugins allow."""
    options, env = ["-v", "-ra", "--tb=short", "-p", "no:cacheprovider"], {}
    if importlib.util.find_spec("xdist") and CORES > 2:
        options += ["-n", str(CORES - 2)]
        env["OMP_NUM_THREADS"] = "1"
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout=100"]
    return module("pytest", *options), env


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for. ``deadline`` is on the clock of ``time.monotonic``; ``tests`` is
    pytest's -k, "" the usual selection."""

    stages: tuple[str, ...]
    deadline: float
    rehearse: bool = False
    ops: tuple[str, ...] = OPS
    tests: str = ""


@dataclass(frozen=True)
class Stage:
    """A command with a time limit; its output is appended to ``log``. ``may_be_late``: no failure if cut."""

    name: str
    command: list[str]
    log: str
    limit: float
    env: dict[str, str] = field(default_factory=dict)
    may_be_late: bool = False
    cwd: Path = ROOT


class Check:
    def __init__(self, out: Path, wishes: Wishes, machine: str, capability: list[int] | None) -> None:
        self.out, self.wishes, self.rehearse = out, wishes, wishes.rehearse
        self.machine, self.capability = machine, capability
        self.stages: list[dict[str, Any]] = []
        # A shell that runs this in the background has interrupts ignored, by every command of a stage as
        # well: none could be stopped in time to write down what it has.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # nvcc and its companions are not always on the path.
        path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
        self.env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        if self.rehearse:
            self.env["TRITON_INTERPRET"] = "1"

    # ---- running a command

    def left(self) -> float:
        return self.wishes.deadline - time.monotonic()

    def stage(self, stage: Stage) -> bool:
        """Runs the stage within its limit and the budget."""
        limit = min(stage.limit, self.left())
        begin = time.monotonic()
        if limit < SHORTEST_S:
            self.note(stage.name, "left out: out of time", stage.may_be_late)
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
                stop(process)
                self.note(stage.name, "out of time", stage.may_be_late, time.monotonic() - begin)
                return False
        outcome = "passed" if code == 0 else f"FAILED (exit status {code})"
        self.note(stage.name, outcome, code == 0, time.monotonic() - begin)
        if code:
            text = (self.out / stage.log).read_text(errors="replace")
            print("\n".join(text.splitlines()[-25:]), flush=True)
        return code == 0

    def note(self, name: str, outcome: str, good: bool, seconds: float = 0.0) -> None:
        self.stages.append({"stage": name, "outcome": outcome, "good": good, "seconds": round(seconds, 1)})
        self.write("summary.txt", self.outcome())

    def leave_out(self, name: str, reason: str) -> None:
        self.note(name, f"left out: {reason}", good=True)

    def tool(self, name: str) -> str | None:
        return shutil.which(name, path=self.env["PATH"])

    @property
    def tiny(self) -> list[str]:
        return ["--tiny", "--device", "cpu"] if self.rehearse else []

    # ---- the stages

    def build(self) -> None:
        """The extension, and beside it what comes next of Triton's kernels."""
        env = {"MAX_JOBS": str(CORES)}
        if self.capability:
            env |= {"COGVIEW_CUDA": "1", "COGVIEW_CUDA_ARCHS": "".join(map(str, self.capability))}
        # Where `make build` has them, so that nothing is compiled twice.
        objects = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        (ROOT / "build").mkdir(exist_ok=True)
        build = Stage("build", build_command(ROOT, objects), "build.log", 150, env, cwd=ROOT / "build")
        # Only Triton's backend: the extension is not there yet.
        options = ["--checks", "--select", "bfloat16-.* triton", "--processes", str(max(1, CORES // 2))]
        command = module("benchmarks.once", *options, *self.tiny, *self.wishes.ops)
        warm = Stage("compiling Triton kernels", command, "run.log", 75, may_be_late=True)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.stage, [build, warm]))

    def headlines(self, name: str = "headlines", *options: str) -> None:
        limit = self.left() - FINISH_S
        options += ("--out", str(self.out), "--seconds", f"{limit - 10:.0f}")
        command = module("benchmarks.headlines", *options, *self.tiny, *self.wishes.ops)
        self.stage(Stage(name, command, "run.log", limit))

    def rivals(self) -> None:
        self.headlines("headlines with rivals", "--rivals", "--tested", str(self.out / "tests.xml"))

    def tests(self) -> None:
        # Attention comes first: that is the order of the ops, and a cut run has begun with the most valuable.
        kernels = ROOT / "tests" / "kernels"
        files = [path for op in self.wishes.ops for path in sorted(kernels.glob(f"test_{op}*.py"))]
        if self.wishes.ops == OPS:
            files += [path for path in sorted(kernels.glob("test_*.py")) if path not in files]
        pytest, env = pytest_command()
        wanted = self.wishes.tests or (REHEARSED_TESTS if self.rehearse else TESTS)
        options = ["-k", wanted, f"--junitxml={self.out / 'tests.xml'}", *map(str, files)]
        self.stage(Stage("tests on this GPU", [*pytest, *options], "tests.log", 150, env))

    def tune(self) -> None:
        if self.rehearse:
            self.leave_out("tuning of paper", "a rehearsal has no GPU")
            return
        command = module("cogview_kernels.three_region_attention.tune", *tune_options(self.out))
        self.stage(Stage("tuning of paper", command, "run.log", 80, may_be_late=True))

    def counters(self) -> None:
        ncu = ["--clock-control", "none", "-k", LARGEST, "-c", "4"]
        ncu += [word for section in SECTIONS for word in ("--section", section)]
        shape = "" if self.rehearse else "paper-bfloat16-"
        driver = ["three_region_attention", "--select", rf"{shape}fwd\+bwd triton$"]
        self.watched("counters of attention", "ncu", ncu, driver, 80)

    def memcheck(self) -> None:
        self.sanitize("memcheck")

    def racecheck(self) -> None:
        self.sanitize("racecheck")

    def sanitize(self, check: str) -> None:
        options = ["--tool", check, "--error-exitcode", "99", "--target-processes", "all"]
        driver = ["--select", "(bfloat16|float16)-.* (triton|cuda)$", *self.wishes.ops]
        if not self.rehearse:
            driver.append("--tiny")
        self.watched(check, "compute-sanitizer", options, driver, 120)

    def watched(self, name: str, tool: str, options: list[str], driver: list[str], limit: float) -> None:
        """``benchmarks.once`` under a tool; in a rehearsal without it."""
        found = self.tool(tool)
        if found is None and not self.rehearse:
            self.leave_out(name, f"{tool} is not installed")
            return
        before = [] if self.rehearse else [str(found), *options]
        command = [*before, *module("benchmarks.once", *driver, *self.tiny)]
        # Without PyTorch's cache every tensor is an allocation of its own, whose ends a sanitizer watches.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "compute-sanitizer" else {}
        self.stage(Stage(name, command, "run.log", limit, env, may_be_late=True))

    def model(self) -> None:
        device = "cpu" if self.rehearse else "cuda"
        shape = ("--shape", "tiny", "--ranked", "2") if self.rehearse else ("--shape", "base")
        options = ("--dtype", "bf16", "--no-rivals", "--seconds", "3", "--device", device)
        command = module("benchmarks.bench_generate", *shape, *options, "--save", str(self.out))
        self.stage(Stage("generation of base", command, "run.log", 80, may_be_late=True))
        # Another shape, or a step compiled whole, would take minutes.
        wanted = ("--select", r"^(base|tiny)-bfloat16-\w+ (cogview, three-region|plain PyTorch)")
        command = module("benchmarks", "training_step", *wanted, "--save", str(self.out), *self.tiny)
        self.stage(Stage("training step of base", command, "run.log", 120, may_be_late=True))

    def old_ptx(self) -> None:
        nvcc = self.tool("nvcc")
        if nvcc is None or self.capability is None:
            self.leave_out("old PTX", "a rehearsal has no GPU" if self.rehearse else "there is no nvcc")
            return
        # Without CUDA_FORCE_PTX_JIT, which PyTorch's own kernels would not survive: ours have only PTX here.
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        arch = "70" if "compute_70" in listed else "75"
        env = {"MAX_JOBS": str(CORES), "COGVIEW_CUDA": "1", "COGVIEW_CUDA_ARCHS": arch}
        lib = ROOT / "build" / "old-ptx"
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "cogview_kernels", lib / "cogview_kernels", ignore=ignore, dirs_exist_ok=True)
        name, command = f"build for compute_{arch}", build_command(lib, "old-ptx-objects")
        build = Stage(name, command, "build.log", 75, env, may_be_late=True, cwd=ROOT / "build")
        if self.stage(build):
            pytest, threads = pytest_command()
            path = f"pythonpath={shlex.quote(str(lib))} ."
            tests = ["-o", path, "-k", TESTS, "tests/kernels/test_cuda_kernels.py"]
            name = f"CUDA attention from the PTX of compute_{arch}"
            self.stage(Stage(name, [*pytest, *tests], "tests.log", 75, env | threads, may_be_late=True))

    # ---- the whole

    def run(self) -> int:
        for name in self.wishes.stages:
            getattr(self, name.replace("-", "_"))()
        return self.finish()

    def write(self, name: str, text: str) -> None:
        aside = self.out / f"{name}.part"
        aside.write_text(text)
        os.replace(aside, self.out / name)

    def passed(self) -> bool:
        return all(stage["good"] for stage in self.stages)

    def outcome(self) -> str:
        lines = [f"  {s['stage']:<44} {s['seconds']:>6.1f} s  {s['outcome']}" for s in self.stages]
        rehearsal = " (a rehearsal on the CPU: the times mean nothing)" if self.rehearse else ""
        verdict = f"gpu-check on {self.machine}{rehearsal}: {'passed' if self.passed() else 'FAILED'}"
        return "\n".join([*lines, "", verdict]) + "\n"

    def finish(self) -> int:
        results = self.out / "results.json"
        tables, short = "", ""
        if results.exists():
            from benchmarks import report  # PyTorch is imported here, after everything was measured

            documents = json.loads(results.read_text()).values()
            tables = "\n".join(report.text_table(document) for document in documents) + "\n\n"
            short = "\n".join(line for d in documents for line in report.short_lines(d)) + "\n\n"
        self.write("summary.txt", tables + short + self.outcome())
        for path in self.out.glob("*.log"):
            if path.stat().st_size > LOG_BYTES:
                path.write_bytes(path.read_bytes()[-LOG_BYTES:])
        print("\n" + short + self.outcome(), end="", flush=True)
        return 0 if self.passed() else 1


def tune_options(out: Path) -> list[str]:
    return ["64", "--dtypes", "bfloat16", "--dropout", "0", "--processes", str(max(1, CORES - 2)),
            "--save", str(out / "tuned.txt")]  # fmt: skip


def stop(process: subprocess.Popen) -> None:
    """Interrupts the command alone first: pytest then ends its workers itself and writes its report."""
    try:
        process.send_signal(signal.SIGINT)
        process.wait(15)
    except subprocess.TimeoutExpired:
        pass
    # What it left behind ends as well, found by its session: ninja gives each compiler a process group of its
    # own. A parent has a lower number than its children, so it ends first and begins no others.
    for pid in sorted(int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == process.pid:
                os.kill(pid, signal.SIGKILL)
    process.wait(10)


def probe() -> tuple[dict[str, Any] | None, str]:
    """Name and compute capability of the GPU, or None and the reason."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    gpu = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    error = done.stderr.strip().splitlines()
    return gpu, f" ({error[-1]})" if done.returncode and error else ""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=".ci/gpu_check.py", description="make gpu-check")
    parser.add_argument("--tier", choices=TIERS, default="full")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--budget", type=float, help="seconds in all, rather than the tier's")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="rather than the tier's")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="only these")
    parser.add_argument("--tests", default="", metavar="EXPRESSION", help="only these tests: pytest's -k")
    return parser.parse_args(arguments)


def main() -> int:
    started, arguments = time.monotonic(), parse()
    rehearse = os.environ.get("GPU_CHECK_REHEARSE", "0") not in ("", "0")
    gpu, why = ({"name": "no GPU", "capability": None}, "") if rehearse else probe()
    if gpu is None:
        print(f"gpu-check: no NVIDIA GPU answers here{why}; GPU_CHECK_REHEARSE=1 rehearses on the CPU")
        return 1
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    wishes = Wishes(
        stages=tuple(arguments.stages or TIERS[arguments.tier]),
        deadline=started + (arguments.budget or BUDGETS[arguments.tier]),
        rehearse=rehearse,
        ops=tuple(arguments.ops),
        tests=arguments.tests,
    )
    return Check(out, wishes, gpu["name"], gpu["capability"]).run()


if __name__ == "__main__":
    sys.exit(main())
