# SPDX-License-Identifier: Apache-2.0
"""Runs a bench file's cases under pytest-benchmark.

Each test is one variant of one case. The first test of a case races all its variants in turns
(``benchmarks.harness.race``); every test then hands its variant's times to pytest-benchmark, whose clock
replays them, so its tables, ``--benchmark-json`` and ``--benchmark-compare`` show device times taken side by
side. The full row is in ``extra_info``.

An op whose own tests are red is not timed.
"""

from __future__ import annotations

import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from benchmarks import environment, harness, results, timing

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cogview benchmarks")
    group.addoption("--device", default="auto", help="auto (the GPU if there is one), cpu or cuda")
    group.addoption(
        "--tiny", action="store_true", help="tiny shapes, two rounds, no tests first: runs the code only"
    )
    group.addoption("--save", metavar="FOLDER", help="write <device>/<op>.json here, after each case anew")
    group.addoption(
        "--tested", metavar="JUNIT_XML", help="take the tests' outcome from this file, do not run them"
    )
    group.addoption("--stop-after", type=float, metavar="SECONDS", help="leave out the cases that come later")
    group.addoption("--bar", action="store_true", help="a progress bar (use with --capture=sys)")


class ReplayClock:
    """Stands in for pytest-benchmark's timer: moves by the recorded durations and not otherwise."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = ReplayClock()


def op_tests(op: str, report: str | None) -> str:
    """ "" when the op's tests are green, else why it is not to be timed."""
    file = ROOT / "tests" / "kernels" / f"test_{op}.py"
    if not file.exists():
        return f"{op} has no tests (tests/kernels/test_{op}.py)"
    if report is None:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--no-header",
            "-p",
            "no:cacheprovider",
            str(file),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return "" if done.returncode == 0 else f"the tests of {op} are red:\n{done.stdout[-3000:]}"
    cases = [
        case
        for case in ElementTree.parse(report).iter("testcase")
        if case.get("classname", "").split(".")[-1].startswith(f"test_{op}")
    ]
    red = [case.get("name") for case in cases if any(child.tag in ("failure", "error") for child in case)]
    if not cases:
        return f"{report} holds no test of {op}"
    return f"{len(red)} tests of {op} are red: {', '.join(map(str, red[:5]))}" if red else ""


class Run:
    """One bench file in this session: its document grows race by race."""

    def __init__(self, bench: harness.Benchmark, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.bench, self.config = bench, config
        self.device = _device(config)
        self.tiny = config.getoption("--tiny")
        report = config.getoption("--tested")
        self.red = "" if self.tiny and report is None else op_tests(bench.op, report)
        # What -k and friends left over, in order.
        chosen = [item.callspec.params for item in items if getattr(item, "module", None).BENCHMARK is bench]
        self.cases = list(dict.fromkeys(params["case"] for params in chosen))
        names = {params["variant"].name for params in chosen}
        self.variants = tuple(variant for variant in bench.variants if variant.name in names)
        self.outcomes: dict[harness.Case, harness.Outcome] = {}
        self.document: dict[str, Any] = {}

    def _start(self) -> None:
        dtypes = list(dict.fromkeys(case.dtype for case in self.cases))
        self.document = {
            "op": self.bench.op,
            "baseline": self.bench.baseline,
            "environment": environment.describe(self.device),
            "tiny": self.tiny,
            "ceilings": timing.ceilings(self.device, dtypes, tiny=self.tiny),
            "red_tests": self.red,
            "rows": [],
            "skipped": [],
        }

    def outcome(self, case: harness.Case) -> harness.Outcome:
        if case in self.outcomes:
            return self.outcomes[case]
        if not self.document:
            self._start()
        together = [c for c in self.cases if (c.shape, c.dtype) == (case.shape, case.dtype)]
        stop = self.config.getoption("--stop-after")
        if stop is not None and time.monotonic() - self.config.stash[STARTED] > stop:
            late = {variant.name: "out of time" for variant in self.variants}
            outcomes = {c: harness.Outcome(skipped=late) for c in together}
        else:
            outcomes = harness.race(
                self.bench,
                together,
                self.device,
                self.document["ceilings"],
                variants=self.variants,
                limits=timing.Limits(0.0, 2, 2) if self.tiny else None,
            )
        for c, outcome in outcomes.items():
            self.document["rows"] += outcome.rows
            for variant, reason in {**outcome.skipped, **outcome.wrong}.items():
                self.document["skipped"].append({"case": str(c), "variant": variant, "reason": reason})
        self.outcomes.update(outcomes)
        if folder := self.config.getoption("--save"):
            results.save(self.document, Path(folder))
        return self.outcomes[case]


STARTED = pytest.StashKey[float]()
RUNS = pytest.StashKey[dict[str, Run]]()
BAR = pytest.StashKey[Any]()


def _device(config: pytest.Config) -> torch.device:
    name = config.getoption("--device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED] = time.monotonic()
    config.stash[RUNS] = {}
    config.addinivalue_line("markers", "benchmark: pytest-benchmark's options")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    bench = getattr(metafunc.module, "BENCHMARK", None)
    if bench is None or "variant" not in metafunc.fixturenames:
        return
    cases = bench.cases(_device(metafunc.config), metafunc.config.getoption("--tiny"))
    pairs = [(case, variant) for case in cases for variant in bench.variants]
    ids = [f"{case}-{variant.name}" for case, variant in pairs]
    metafunc.parametrize(("case", "variant"), pairs, ids=ids)


@pytest.fixture
def replay(request: pytest.FixtureRequest, benchmark: Any):
    """``replay(case, variant)``: race the case if it has not been, and report the variant."""

    def report(case: harness.Case, variant: harness.Variant) -> None:
        bench, runs = request.module.BENCHMARK, request.config.stash[RUNS]
        if bench.op not in runs:
            runs[bench.op] = Run(bench, request.config, request.session.items)
        run = runs[bench.op]
        # Time on a lent GPU is short: there it is timed all the same, to learn from and not to quote.
        if run.red and run.config.getoption("--tested") is None:
            pytest.fail(run.red, pytrace=False)
        outcome = run.outcome(case)
        if variant.name in outcome.wrong:
            pytest.fail(outcome.wrong[variant.name], pytrace=False)
        if variant.name in outcome.skipped:
            pytest.skip(outcome.skipped[variant.name])
        times = iter(outcome.times_ms[variant.name])

        def play() -> None:
            CLOCK.now += next(times) / 1e3

        benchmark.group = f"{bench.op} {case} ({case.shape})"
        benchmark.extra_info.update(next(row for row in outcome.rows if row["variant"] == variant.name))
        benchmark.pedantic(play, rounds=len(outcome.times_ms[variant.name]), iterations=1)

    return report


def _case(item: pytest.Item | None) -> Any:
    return None if item is None else item.callspec.params["case"]


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--bar"):
        cases = len({(item.path, _case(item)) for item in session.items})
        session.config.stash[BAR] = tqdm(total=cases, file=sys.__stderr__, unit="case", leave=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    bar = item.config.stash.get(BAR, None)
    if bar is not None and bar.desc != f"{_case(item)}: ":
        bar.set_description(str(_case(item)))
    finished = yield
    if bar is not None and _case(item) != _case(nextitem):
        bar.update()
    return finished


def pytest_unconfigure(config: pytest.Config) -> None:
    bar = config.stash.get(BAR, None)
    if bar is not None:
        bar.close()
