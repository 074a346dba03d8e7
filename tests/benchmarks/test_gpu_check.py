# SPDX-License-Identifier: Apache-2.0
"""make gpu-check without a GPU: one clear line, and a rehearsal that goes through every stage."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_rehearsal_goes_through_every_stage(tmp_path):
    select = ["--ops", "stable_softmax", "--tests", "test_empty and triton"]
    select += ["--cases", "float32-fwd (triton|eager)"]
    # Nothing is compiled: other tests use the extension at the same time.
    environment = {"GPU_CHECK_REHEARSE": "1", "COGVIEW_SKIP_EXTENSION": "1"}
    done = gpu_check("--out", str(tmp_path), *select, **environment)
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert report["passed"]
    assert [s["stage"] for s in report["stages"]] == [
        "build",
        "tests of the kernels",
        "benchmark of stable_softmax",
        "old PTX",
        "memcheck",
        "racecheck",
    ]
    rows = json.loads((tmp_path / "results.json").read_text())["stable_softmax"]["rows"]
    assert {"triton", "eager PB-relax"} <= {row["variant"] for row in rows}
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) <= 8 and all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)


@pytest.fixture
def check(tmp_path):
    return script.Check(tmp_path, script.Wishes(budget=60, rehearse=True, ops=()))


def test_a_failed_stage_is_a_failed_check(check, capsys):
    bad = "import sys; sys.exit('the reason')"
    assert check.stage(script.Stage("good", [sys.executable, "-c", "print('fine')"], "tests.log", 30))
    assert not check.stage(script.Stage("bad", [sys.executable, "-c", bad], "tests.log", 30))
    assert check.finish({}, "no machine") == 1
    assert "the reason" in capsys.readouterr().out  # the log's end is shown
    assert (check.out / "tests.log").read_text().splitlines().count("fine") == 1


@pytest.mark.parametrize("may_be_late", [False, True])
def test_a_stage_is_stopped_at_its_limit(check, may_be_late, monkeypatch):
    monkeypatch.setattr(script, "SHORTEST_S", 0)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    check.stage(script.Stage("slow", command, "bench.log", 0.3, may_be_late=may_be_late))
    assert check.stages[-1]["outcome"] == "out of time" and check.stages[-1]["seconds"] < 60
    assert check.finish({}, "no machine") == (0 if may_be_late else 1)


def test_stages_can_be_asked_for_alone(tmp_path):
    done = gpu_check("--out", str(tmp_path), "--stages", "racecheck", "old-ptx", GPU_CHECK_REHEARSE="1")
    stages = json.loads((tmp_path / "gpu-check.json").read_text())["stages"]
    assert done.returncode == 0 and [s["stage"] for s in stages] == ["old PTX", "racecheck"]


def test_a_stage_without_time_is_left_out(check):
    check.stage(script.Stage("late", ["never run"], "bench.log", 1))
    assert check.stages[-1]["outcome"] == "left out: out of time"
