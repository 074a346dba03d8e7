# SPDX-License-Identifier: Apache-2.0
"""Tables and plots: a function of the results files, and up to date with them."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import report, results, tiles
from benchmarks.definitions import benchmark_of


def row(variant, kind, ms, **more):
    return {
        "shape": "paper",
        "sizes": "B=4",
        "dtype": "bfloat16",
        "direction": "fwd",
        "variant": variant,
        "kind": kind,
        "note": "",
        "ms": ms,
        "ms_quartiles": [0.95 * ms, 1.05 * ms],
        "rate": 300.0,
        "rate_unit": "TFLOP/s",
        "formula": "4 pairs D",
        "share_of_ceiling": 0.4,
        "peak_bytes": 64 << 20,
        "result_bytes": 32 << 20,
        **more,
    }


ENVIRONMENT = {
    "device": "Some CPU",
    "date": "2026-01-02 03:04 UTC",
    "commit": "0123456789ab",
    "modified": False,
    "python": "3.12.3",
    "torch": "2.11.0",
    "triton": None,
    "cuda": None,
    "cpu_threads": 2,
    "allocator": "system malloc",
}
DOCUMENT = {
    "op": "three_region_attention",
    "baseline": "dense",
    "environment": ENVIRONMENT,
    "tiny": False,
    "finished": True,
    "red_tests": "",
    "ceilings": {"copy_gb_s": 20.0, "matmul_tflop_s": {"bfloat16": 700.0}},
    "rows": [row("dense", "rival", 2.0), row("cpu", "backend", 0.5), row("loop", "rival", 1.0)],
    "skipped": [{"case": "paper-bfloat16-fwd", "variant": "Liger", "reason": "not installed"}],
}
GPU = copy.deepcopy(DOCUMENT)
GPU["environment"] |= {"device": "Some GPU", "capability": "9.0", "driver": "580", "clocks": "1980 MHz"}
GPU["rows"][1]["host_us"] = 5.0


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "README.md").write_text(
        f"# Title\n\n{report.DEMO_BEGIN}\n{report.DEMO_END}\n{report.BEGIN}\nstale\n{report.END}\n\nafter\n"
    )
    folder = tmp_path / "benchmarks" / "results"
    results.write_json(folder / "some-cpu" / "three_region_attention.json", DOCUMENT)
    results.write_json(folder / "some-gpu" / "three_region_attention.json", GPU)
    return tmp_path


def test_written_once_and_then_up_to_date(checkout):
    written = report.generate(root=checkout)
    assert "README.md" in written
    assert "benchmarks/results/some-cpu/three_region_attention.png" in written
    assert "benchmarks/results/some-cpu/summary.png" in written and "benchmarks/results/README.md" in written
    assert report.generate(root=checkout, check=True) == []
    text = (checkout / "README.md").read_text()
    assert "stale" not in text and text.endswith("\n\nafter\n")
    assert not list(checkout.rglob("*.part"))


def test_changed_results_are_noticed(checkout):
    report.generate(root=checkout)
    changed = copy.deepcopy(DOCUMENT)
    changed["rows"][1]["ms"] = 0.25
    results.write_json(checkout / "benchmarks/results/some-cpu/three_region_attention.json", changed)
    assert set(report.generate(root=checkout, check=True)) == {
        "README.md",
        "benchmarks/results/README.md",
        "benchmarks/results/some-cpu/README.md",
        "benchmarks/results/some-cpu/summary.png",
        "benchmarks/results/some-cpu/three_region_attention.png",
    }


def test_ratios_everywhere_milliseconds_for_a_gpu_alone():
    cpu, gpu = report.device_page({"three_region_attention": DOCUMENT}), report.text_table(GPU)
    assert "4.00x" in cpu and "| ms |" not in cpu and "0.50" not in cpu
    assert " ms " in gpu and "0.50" in gpu and "4.00x" in gpu
    assert "32 MiB" in cpu and "Liger, 1 cases: not installed" in cpu
    assert "Unmeasured on this device." in cpu  # the other ops


def test_summary_names_the_fastest_rival_and_what_is_unmeasured():
    text = report.results_page({"some-cpu": {"three_region_attention": DOCUMENT}})
    assert "GPU: unmeasured" in text
    assert "| cpu | loop | 2.00x | dense: 4.00x |" in text
    assert "| decode_attention | unmeasured |" in text
    assert "GPU: unmeasured" not in report.results_page({"some-gpu": {"three_region_attention": GPU}})


def test_readme_keeps_a_few_rows_with_the_memory_of_both():
    both = copy.deepcopy(DOCUMENT)
    for row in both["rows"]:
        row["direction"] = "fwd+bwd"
    both["rows"][1]["peak_bytes"] = 40 << 20
    text = report.summary({"some-cpu": {"three_region_attention": both}})
    assert "GPU: unmeasured" in text and "[every row](benchmarks/results/some-cpu/README.md)" in text
    row = "| `three_region_attention` | paper, bfloat16, fwd+bwd | 2.00x as fast as loop | 8 MiB, 32 MiB |"
    assert row in text
    assert "GPU: unmeasured" not in report.summary({"some-gpu": {"three_region_attention": GPU}})


def test_readme_takes_the_first_direction_that_there_is_and_says_what_is_not():
    text = report.summary({"some-cpu": {"three_region_attention": DOCUMENT}})
    assert "| `three_region_attention` | paper, bfloat16, fwd | 2.00x as fast as loop | " in text
    both = copy.deepcopy(DOCUMENT)
    both["rows"] += [line | {"direction": "fwd+bwd"} for line in DOCUMENT["rows"]]
    text = report.summary({"some-cpu": {"three_region_attention": both}})
    assert "paper, bfloat16, fwd+bwd |" in text and "paper, bfloat16, fwd |" not in text
    elsewhere = copy.deepcopy(DOCUMENT)
    for row in elsewhere["rows"]:
        row["shape"] = "another"
    text = report.summary({"some-cpu": {"three_region_attention": elsewhere}})
    assert "| `three_region_attention` | paper, fwd+bwd | unmeasured | unmeasured |" in text
    alone = DOCUMENT | {"rows": DOCUMENT["rows"][1:2]}
    text = report.summary({"some-cpu": {"three_region_attention": alone}})
    assert "| `three_region_attention` | paper, bfloat16, fwd | unmeasured | " in text


def test_rivals_that_a_run_was_not_asked_for_are_named():
    """The fastest that ran need not be the fastest there is."""
    documents = {"three_region_attention": DOCUMENT}
    text = report.summary({"some-cpu": documents})
    assert "Rivals that did not race there:\n\n- `three_region_attention`: dense causal SDPA; " in text
    assert "- FlexAttention, mask, 1 cases: not asked for\n" in report.device_page(documents)
    names = [v.name for v in benchmark_of("three_region_attention").rivals]
    of_all = [{"case": "paper-bfloat16-fwd", "variant": name, "reason": "no GPU"} for name in names]
    documents = {"three_region_attention": DOCUMENT | {"skipped": of_all}}
    assert "did not race" not in report.summary({"some-cpu": documents})
    assert "not asked for" not in report.device_page(documents)


def test_a_run_that_was_cut_short_says_so():
    cut = DOCUMENT | {"finished": False}
    assert "This run was cut short." in report.device_page({"three_region_attention": cut})
    assert "This run was cut short." not in report.device_page({"three_region_attention": DOCUMENT})


def test_unsteady_times_are_marked():
    shaken = copy.deepcopy(DOCUMENT)
    shaken["rows"][1]["ms_quartiles"] = [0.4, 0.6]
    assert "~4.00x" in report.text_table(shaken) and "~" not in report.text_table(DOCUMENT)


def test_a_readme_without_markers_is_an_error():
    with pytest.raises(ValueError, match="markers"):
        report.put_between_markers("# Title\n", "block")


def test_tiles():
    by_shape = {row["shape"]: row for row in tiles.table()}
    paper = by_shape["paper"]
    assert paper["causal_tiles"] == 33 * 34 // 2
    assert paper["block_mask_tiles"] == paper["causal_tiles"]  # nothing to skip: the reason for gathering
    assert 0.45 < paper["gathered_tiles"] / paper["causal_tiles"] < 0.52


def test_this_repository_is_up_to_date():
    assert report.generate(check=True) == [], "run `python -m benchmarks.report`"


RED = "2 tests of three_region_attention are red: a, b"


@pytest.mark.parametrize(
    ("spoilt", "reason"), [({"red_tests": RED}, RED), ({"tiny": True}, "the shapes are tiny")]
)
def test_figures_that_may_not_be_quoted_are_not_taken(spoilt, reason, tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"three_region_attention": GPU | spoilt}))
    monkeypatch.setattr(results, "save", lambda document: pytest.fail("was taken"))
    monkeypatch.setattr(report, "generate", lambda check: [])
    monkeypatch.setattr("sys.argv", ["report", "--import", str(tmp_path / "results.json")])
    assert report.main() == 0
    assert f"left, not to be quoted: three_region_attention: {reason}" in capsys.readouterr().out


PASSED = '<testcase classname="tests.kernels.test_three_region_attention" name="test_sum"/>'
SKIPPED = PASSED.replace("/>", "><skipped/></testcase>")


@pytest.mark.parametrize(
    ("cases", "taken", "reason"),
    [
        (PASSED, 1, ""),
        (SKIPPED + PASSED, 1, ""),
        (SKIPPED, 0, "holds no test of three_region_attention that ran"),
        (PASSED.replace("three_region", "another"), 0, "holds no test of three_region_attention that ran"),
        (PASSED.replace("/>", "><failure/></testcase>"), 0, "are red: test_sum"),
        (None, 0, "there is no"),
    ],
)
def test_figures_are_taken_with_the_tests_that_lie_beside_them(
    cases, taken, reason, tmp_path, monkeypatch, capsys
):
    (tmp_path / "results.json").write_text(json.dumps({"three_region_attention": GPU}))
    if cases is not None:
        (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    saved = []
    monkeypatch.setattr(results, "save", saved.append)
    monkeypatch.setattr(report, "generate", lambda check: [])
    monkeypatch.setattr("sys.argv", ["report", "--import", str(tmp_path / "results.json")])
    assert report.main() == 0
    assert len(saved) == taken and reason in capsys.readouterr().out


def test_figures_of_an_op_with_red_tests_are_marked_in_a_terminal_and_not_written(checkout, capsys):
    red = GPU | {"red_tests": RED}
    assert "NOT TO BE QUOTED: 2 tests" in report.text_table(red)
    assert all("(its tests are RED)" in line for line in report.short_lines(red))
    results.write_json(checkout / "benchmarks/results/some-gpu/three_region_attention.json", red)
    assert not any("some-gpu" in path for path in report.generate(root=checkout))
    assert "Some GPU" not in (checkout / "README.md").read_text()
    assert f"left, not to be quoted: three_region_attention: {RED}" in capsys.readouterr().out
