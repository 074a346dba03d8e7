# SPDX-License-Identifier: Apache-2.0
"""The race: what is saved when, what is left out and why, and what turns a run red."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import harness, results, verdict
from benchmarks.definitions import Variant, benchmark_of
from benchmarks.timing import Limits

CPU = torch.device("cpu")
TINY = harness.Options(tiny=True, select="tiny-float32")
RIVALS = ("eager PB-relax", "eager softmax")


def raising(error: Exception, kind: str = "backend") -> Variant:
    def prepare(inputs, case):
        raise error

    return Variant("raising", prepare, kind=kind)


def softmax_with(*variants: Variant):
    bench = benchmark_of("stable_softmax")
    rivals = tuple(v for v in bench.variants if v.name in RIVALS)
    return dataclasses.replace(bench, backends=(), rivals=(*variants, *rivals))


def outcomes(bench, options=TINY):
    return [outcome for _, outcome in harness.measure(bench, CPU, options)]


@pytest.fixture
def no_ceilings(monkeypatch):
    found = {"copy_gb_s": 1.0, "matmul_tflop_s": {"float32": 1.0}}
    monkeypatch.setattr(harness.timing, "ceilings", lambda *a, **k: found)


@pytest.mark.parametrize(
    ("dtype", "products", "ceiling"),
    [
        (torch.bfloat16, {"float32": 0.2, "bfloat16": 0.4}, 0.4),
        (torch.bfloat16, {"float32": 0.2, "bfloat16": 0.001}, 0.2),
        (torch.bfloat16, {"bfloat16": 0.4}, 0.4),
        (torch.float32, {"float32": 0.2, "bfloat16": 0.4}, 0.2),
    ],
)
def test_the_ceiling_of_a_product_is_the_fastest_way_to_make_it(dtype, products, ceiling):
    case = dataclasses.replace(benchmark_of("stable_softmax").cases(CPU, True)[0], dtype=dtype)
    assert harness._product_ceiling({"matmul_tflop_s": products}, case) == ceiling


def test_every_outcome_is_in_the_document_when_it_is_told(no_ceilings):
    lengths, document = [], {}
    bench = softmax_with(raising(RuntimeError("no"), "rival"))
    for document, outcome in harness.measure(bench, CPU, TINY):
        lengths.append(len(document["rows"]) + len(document["skipped"]))
        newest = document["rows"][-1] if outcome.row else document["skipped"][-1]
        assert newest["variant"] == outcome.variant.name
        assert not document["finished"]
    assert lengths == list(range(1, 1 + 2 * 3)) and document["finished"]


def test_a_cut_keeps_what_was_measured(no_ceilings, tmp_path, monkeypatch):
    """An interrupt in the second case: the file on disk holds the rows of the first."""
    race = harness.timing.interleave
    seen = []

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return race(*arguments)

    monkeypatch.setattr(harness.timing, "interleave", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run("stable_softmax", CPU, dataclasses.replace(TINY, select="tiny-float32.*eager"), tmp_path)
    (path,) = tmp_path.glob("*/stable_softmax.json")
    document = results.load(path)
    assert {row["variant"] for row in document["rows"]} == set(RIVALS) and not document["finished"]
    assert {row["direction"] for row in document["rows"]} == {"fwd"}


def test_a_finished_op_replaces_the_results_and_a_cut_one_does_not(no_ceilings, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "APART", tmp_path / "apart")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(command, "keep_pages", lambda device: None)
    monkeypatch.setattr(verdict, "of_tests", lambda op: "")
    cases = benchmark_of("stable_softmax").cases(CPU, True)[:2]
    few = dataclasses.replace(softmax_with(), cases=lambda *_: cases)
    monkeypatch.setattr(command, "benchmark_of", lambda op: few)
    monkeypatch.setattr("sys.argv", ["benchmarks", "stable_softmax", "--device", "cpu"])
    race = harness.timing.interleave
    monkeypatch.setattr(harness.timing, "interleave", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command.main() == 130
    assert not (tmp_path / "results").exists()
    once = lambda jobs, device, _: race(jobs, device, Limits(0, 1, 1))  # noqa: E731
    monkeypatch.setattr(harness.timing, "interleave", once)
    assert command.main() == 0
    (path,) = tmp_path.glob("results/*/stable_softmax.json")
    assert results.load(path)["finished"]


def test_what_would_begin_after_the_deadline_is_left_out(no_ceilings):
    late = dataclasses.replace(TINY, deadline=time.monotonic() - 1)
    told = outcomes(softmax_with(), late)
    assert [o.reason for o in told] == ["out of time"] * 4 and not any(o.failed for o in told)


def test_the_deadline_holds_within_a_case(no_ceilings, monkeypatch):
    clock = iter([0.0, 0.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(harness.time, "monotonic", lambda: next(clock))
    told = outcomes(softmax_with(), dataclasses.replace(TINY, select="tiny-float32-fwd", deadline=1.0))
    assert {o.variant.name: o.reason for o in told} == {RIVALS[0]: "", RIVALS[1]: "out of time"}


@pytest.mark.parametrize(
    ("error", "kind", "failed"),
    [
        (RuntimeError("no"), "backend", True),
        (RuntimeError("no"), "option", True),
        (NotImplementedError("bfloat16 is not written"), "backend", False),
        (RuntimeError("no"), "rival", False),
    ],
)
def test_only_a_backend_that_breaks_its_word_turns_a_run_red(no_ceilings, error, kind, failed):
    told = outcomes(softmax_with(raising(error, kind)))
    (first, *_) = [o for o in told if o.variant.name == "raising"]
    assert first.failed is failed and first.reason == f"{type(error).__name__}: {error}"
    assert sum(o.row is not None for o in told) == 2 * len(RIVALS)


def test_a_case_whose_inputs_cannot_be_made_does_not_end_the_run(no_ceilings):
    bench = softmax_with()
    made = bench.inputs

    def inputs(case, device):
        if case.shape.name == "tiny":
            raise torch.OutOfMemoryError("too large")
        return made(case, device)

    told = outcomes(dataclasses.replace(bench, inputs=inputs), dataclasses.replace(TINY, select="float32"))
    reasons = {o.reason for o in told if o.case.shape.name == "tiny"}
    assert reasons == {"OutOfMemoryError: too large"}
    assert all(o.row for o in told if o.case.shape.name == "tiny-causal")


def test_select_is_searched_for_in_case_and_variant():
    bench = benchmark_of("stable_softmax")
    options = harness.Options(tiny=True, select="^tiny-float32-fwd (cpu|eager softmax$)")
    pairs = harness.wanted(bench, CPU, options)
    assert [(str(case), v.name) for case, v in pairs] == [
        ("tiny-float32-fwd", "cpu"),
        ("tiny-float32-fwd", "eager softmax"),
    ]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def test_a(): pass", ""),
        ("def test_a(): pass\ndef test_b(): assert False", "1 tests of op are red: test_b"),
        ("import no_such_module", "1 tests of op are red: tests.kernels.test_op"),
    ],
)
def test_the_verdict_on_an_op_is_one_line(body, said, tmp_path, monkeypatch):
    file = tmp_path / "tests" / "kernels" / "test_op.py"
    file.parent.mkdir(parents=True)
    file.write_text(body + "\n")
    monkeypatch.setattr(verdict, "ROOT", tmp_path)
    assert verdict.of_tests("op") == said


def test_an_op_without_tests_is_not_to_be_quoted(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, "ROOT", tmp_path)
    assert verdict.of_tests("op") == "op has no tests (tests/*/test_op.py)"


def test_a_red_op_is_named_once_timed_all_the_same_and_kept_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verdict, "of_tests", lambda op: "2 tests of stable_softmax are red: a, b")
    monkeypatch.setattr(command, "APART", tmp_path / "apart")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(command, "keep_pages", lambda device: None)
    shapes = {"cases": lambda device, tiny: benchmark_of("stable_softmax").cases(device, True)[:1]}
    small = dataclasses.replace(softmax_with(), **shapes)
    monkeypatch.setattr(command, "benchmark_of", lambda op: small)
    monkeypatch.setattr("sys.argv", ["benchmarks", "stable_softmax", "--device", "cpu"])
    assert command.main() == 1
    out = capsys.readouterr().out
    assert out.count("2 tests of stable_softmax are red: a, b") == 1
    (path,) = tmp_path.glob("apart/*/stable_softmax.json")
    document = results.load(path)
    assert len(document["rows"]) == len(RIVALS) and document["red_tests"] and not document["tiny"]
    assert not (tmp_path / "results").exists()


def test_an_op_with_red_tests_is_timed_but_not_quoted(tmp_path, monkeypatch, no_ceilings):
    """The tests were run and judged before; what they said is in a file."""
    tested = tmp_path / "tests.xml"
    case = (
        '<testcase classname="tests.kernels.test_stable_softmax_triton" name="test_sum"><failure/></testcase>'
    )
    tested.write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    monkeypatch.setattr(command, "keep_pages", lambda device: None)
    options = ["--tested", str(tested), "--tiny", "--device", "cpu", "--select", "float32-fwd eager"]
    monkeypatch.setattr("sys.argv", ["benchmarks", "stable_softmax", "--save", str(tmp_path), *options])
    assert command.main() == 0
    (path,) = tmp_path.glob("*/stable_softmax.json")
    document = results.load(path)
    assert document["rows"] and document["red_tests"] == "1 tests of stable_softmax are red: test_sum"


def test_an_unknown_op_is_an_error():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "softmax"], cwd=verdict.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no op is called softmax; there are three_region_attention" in done.stderr
