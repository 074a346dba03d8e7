# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and plots from the results files; nothing in them is typed by hand.

``python -m benchmarks.report``            README.md between its markers, the pages under results/, the plots
``python -m benchmarks.report --check``    exit status 1 if any of these does not match the results files
``python -m benchmarks.report --import F`` first take the results in F, as ``make gpu-check`` writes them; the
                                         tests.xml beside F tells of which ops the tests are green
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import BENCHMARKS, plots, results, tiles, verdict
from benchmarks.definitions import benchmark_of
from benchmarks.results import Document, Row

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks: written by `python -m benchmarks.report` -->", "<!-- /benchmarks -->"
DEMO_BEGIN, DEMO_END = "<!-- demo: written by `python -m benchmarks.report` -->", "<!-- /demo -->"
UNMEASURED = "unmeasured"
CHART = "summary.png"

# README.md's few rows: of each op the first of these shapes and directions that a device has. The last op is
# slower than its rivals on some devices and takes a fraction of their memory.
FEW = (
    ("three_region_attention", ("paper",), ("fwd+bwd", "fwd")),
    ("sandwich_layer_norm", ("width",), ("fwd",)),
    ("stable_softmax", ("causal",), ("fwd",)),
    ("decode_attention", ("paper",), ("fwd",)),
    ("linear_cross_entropy", ("cogview", "quarter"), ("fwd+bwd",)),
)


def speed_text(row: Row, rows: list[Row], baseline: str) -> str:
    """With "~" where the quartiles of either time lie more than a fifth of the median apart."""
    pair = [r for r in rows if r is row or r["variant"] == baseline]
    unsteady = any(r["ms_quartiles"][1] - r["ms_quartiles"][0] > 0.2 * r["ms"] for r in pair)
    return ("~" if unsteady else "") + _number(results.speed(row, rows, baseline), "x")


def extra_bytes(row: Row) -> int | None:
    """Peak memory beyond inputs and results."""
    return None if row["peak_bytes"] is None else max(0, row["peak_bytes"] - row["result_bytes"])


def not_raced(document: Document, case: tuple[str, str, str, str]) -> list[str]:
    """The rivals that a run was not asked for in a case: any of them may be faster than those that ran."""
    shape, _, dtype, direction = case
    told = {row["variant"] for row in results.by_case(document).get(case, [])}
    name = f"{shape}-{dtype}-{direction}"
    told |= {entry["variant"] for entry in document["skipped"] if entry["case"] == name}
    rivals = [variant.name for variant in benchmark_of(document["op"]).rivals if variant.kind == "rival"]
    return [rival for rival in rivals if rival not in told]


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return UNMEASURED
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:.{digits}f}{unit}"


def _memory(value: int | None) -> str:
    if value is None:
        return UNMEASURED
    return f"{value / 2**20:.0f} MiB" if value >= 2**20 else "< 1 MiB"


def columns(document: Document, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Times in milliseconds only where they hold beyond this run, that is on a GPU."""
    gpu = results.on_gpu(document)
    header = ["variant", f"speed, {document['baseline']} = 1", "share of ceiling", "extra memory"]
    if gpu:
        header[1:1] = ["ms", "rate", "host us"]
    table = []
    for row in rows:
        share = f"{100 * row['share_of_ceiling']:.0f} %"
        line = [row["variant"], speed_text(row, rows, document["baseline"]), share]
        line.append(_memory(extra_bytes(row)))
        if gpu:
            ms = _number(row["ms"]) + (f" (graph {_number(row['graph_ms'])})" if row.get("graph_ms") else "")
            line[1:1] = [ms, f"{_number(row['rate'])} {row['rate_unit']}", _number(row.get("host_us"))]
        table.append(line)
    return header, table


def text_table(document: Document) -> str:
    """For a terminal."""
    lines = [f"\nNOT TO BE QUOTED: {document['red_tests']}"] if document["red_tests"] else []
    for (shape, sizes, dtype, direction), rows in results.by_case(document).items():
        header, table = columns(document, rows)
        lines.append(f"\n{document['op']}, {shape} ({sizes}), {dtype}, {direction}")
        align = ("left", *["right"] * (len(header) - 1))
        lines.append(tabulate(table, header, "simple", colalign=align, disable_numparse=True))
    return "\n".join(lines)


def short_lines(document: Document) -> list[str]:
    """One line per case of :func:`results.headline`."""
    lines = []
    for (shape, _, dtype, direction), ours, rows in results.headline(document):
        rival = results.fastest_rival(rows)
        against = f", {_number(rival['ms'] / ours['ms'])}x as fast as {rival['variant']}" if rival else ""
        share = f"{100 * ours['share_of_ceiling']:.0f} % of ceiling"
        name = f"{document['op']} {shape} {dtype} {direction}"
        share += " (its tests are RED)" if document["red_tests"] else ""
        lines.append(f"  {name}: {ours['variant']} {_number(ours['ms'])} ms, {share}{against}")
    return lines


def _markdown_table(header: list[str], table: list[list[str]], text: int = 1) -> list[str]:
    """The first ``text`` columns to the left, the others to the right."""
    align = ["---"] * text + ["---:"] * (len(header) - text)
    return ["| " + " | ".join(line) + " |" for line in (header, align, *table)]


def _environment_lines(document: Document) -> list[str]:
    e = document["environment"]
    ceilings = document["ceilings"]
    software = f"Python {e['python']}, PyTorch {e['torch']}, Triton {e['triton'] or 'not installed'}"
    if results.on_gpu(document):
        software += f", CUDA {e['cuda']}, driver {e['driver']}; clocks and limits {e['clocks']}"
    else:
        software += f", {e['cpu_threads']} threads, allocator: {e['allocator']}"
    copy = f"copy {_number(ceilings['copy_gb_s'])} GB/s"
    rates = ", ".join(f"{_number(v)} TFLOP/s {k}" for k, v in ceilings["matmul_tflop_s"].items())
    commit = e["commit"] + (" with uncommitted changes" if e["modified"] else "")
    return [
        f"{e['device']}, {e['date']}, commit {commit}. {software}.",
        f"Ceilings measured in the same run: {copy}, matrix product {rates}.",
    ]


def device_page(documents: dict[str, Document]) -> str:
    """``benchmarks/results/<device>/README.md``: every row and every reason."""
    first = next(iter(documents.values()))
    lines = [
        f"# {first['environment']['device']}",
        "",
        "Written by `python -m benchmarks.report` from the JSON files beside it. What the columns mean is in",
        "[benchmarks/README.md](../../README.md).",
    ]
    for op in BENCHMARKS:
        lines += ["", f"## {op}", ""]
        if op not in documents:
            lines.append(f"{UNMEASURED.capitalize()} on this device.")
            continue
        document = documents[op]
        lines += [*_environment_lines(document), "", f"![{op}]({op}.png)"]
        if not document["finished"]:
            lines += ["", "This run was cut short."]
        for (shape, sizes, dtype, direction), rows in results.by_case(document).items():
            lines += [
                "",
                f"### {shape}, {dtype}, {direction}",
                "",
                f"{sizes}. Ceiling counts: {rows[0]['formula']}.",
                "",
            ]
            lines += _markdown_table(*columns(document, rows))
        notes = {row["variant"]: row["note"] for row in document["rows"] if row["note"]}
        if notes:
            lines += ["", *(f"- {variant}: {note}." for variant, note in notes.items())]
        reasons: dict[tuple[str, str], int] = {}
        for entry in document["skipped"]:
            key = (entry["variant"], entry["reason"])
            reasons[key] = reasons.get(key, 0) + 1
        for case in results.by_case(document):
            for rival in not_raced(document, case):
                key = (rival, "not asked for")
                reasons[key] = reasons.get(key, 0) + 1
        if reasons:
            lines += ["", "Not timed:", ""]
            lines += [f"- {variant}, {count} cases: {reason}" for (variant, reason), count in reasons.items()]
    return "\n".join(lines) + "\n"


def unmeasured_gpu(everything: dict[str, dict[str, Document]]) -> list[str]:
    if any(results.on_gpu(next(iter(documents.values()))) for documents in everything.values()):
        return []
    return [f"GPU: {UNMEASURED}. `make gpu-check OUT=folder` measures it where there is one.", ""]


def summary(everything: dict[str, dict[str, Document]]) -> str:
    """The block between README.md's markers: a few rows a device."""
    lines = unmeasured_gpu(everything)
    for folder, documents in everything.items():
        device = next(iter(documents.values()))["environment"]["device"]
        table, missing = [], []
        for op, shapes, ways in FEW:
            if document := documents.get(op):
                row, rivals = _few_row(document, shapes, ways)
                table.append(row)
                missing += [f"- `{op}`: {'; '.join(rivals)}."] if rivals else []
        header = ["op", "case", "against the fastest rival that ran", "extra memory: ours, the rival's"]
        lines += [f"**{device}** ([every row](benchmarks/results/{folder}/README.md))", ""]
        lines += [*_markdown_table(header, table, text=3), ""]
        lines += ["Rivals that did not race there:", "", *missing, ""] if missing else []
    lines.append("[The whole table and its chart](benchmarks/results/README.md).")
    return "\n".join(lines) + "\n"


def _few_row(
    document: Document, shapes: tuple[str, ...], ways: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """The row, and the rivals that did not race in its case."""
    op = f"`{document['op']}`"
    found = [one for one in results.headline(document) if one[0][0] in shapes and one[0][3] in ways]
    if not found:
        return [op, f"{shapes[0]}, {ways[0]}", UNMEASURED, UNMEASURED], []
    case, ours, rows = min(found, key=lambda one: ways.index(one[0][3]))
    shape, _, dtype, way = case
    return [op, f"{shape}, {dtype}, {way}", *_beside_rival(ours, rows)], not_raced(document, case)


def _beside_rival(ours: Row, rows: list[Row]) -> tuple[str, str]:
    """How fast, and what memory; a race may have had no rival."""
    rival = results.fastest_rival(rows)
    if rival is None:
        return UNMEASURED, f"{_memory(extra_bytes(ours))}, {UNMEASURED}"
    against = f"{speed_text(ours, rows, rival['variant'])} as fast as {rival['variant']}"
    return against, f"{_memory(extra_bytes(ours))}, {_memory(extra_bytes(rival))}"


def results_page(everything: dict[str, dict[str, Document]]) -> str:
    """``benchmarks/results/README.md``: our fastest backend in every case of the first dtype, by device."""
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks.report` from the JSON files below this folder.",
        "[How it is measured](../README.md). The fastest rival is that of those which ran; a device's page",
        "names the others.",
        "",
        *unmeasured_gpu(everything),
    ]
    for folder, documents in everything.items():
        first = next(iter(documents.values()))
        gpu = results.on_gpu(first)
        lines += [f"## {first['environment']['device']}", "", f"[Every row]({folder}/README.md).", ""]
        lines += [f"![Times faster than the fastest rival]({folder}/{CHART})", ""]
        table = [row for op in BENCHMARKS for row in _summary_rows(op, documents.get(op), gpu)]
        header = ["op", "shape, dtype, direction", "backend", "fastest rival", "times faster", "against"]
        lines += [*_markdown_table([*header, *(["ms"] if gpu else [])], table, text=4), ""]
    lines += ["## What there is to gain", "", tiles.markdown()]
    return "\n".join(lines).rstrip() + "\n"


def _summary_rows(op: str, document: Document | None, gpu: bool) -> list[list[str]]:
    if document is None:
        return [[op, UNMEASURED, *[""] * (5 if gpu else 4)]]
    rows = []
    for (shape, _, dtype, direction), ours, raced in results.headline(document):
        rival = results.fastest_rival(raced)
        line = [op, f"{shape}, {dtype}, {direction}", ours["variant"]]
        line += [rival["variant"], speed_text(ours, raced, rival["variant"])] if rival else ["", UNMEASURED]
        line.append(f"{document['baseline']}: {speed_text(ours, raced, document['baseline'])}")
        rows.append([*line, _number(ours["ms"])] if gpu else line)
    return rows


def demo_section(folder: Path) -> str:
    """What ``make demo`` reached, one line per ``<device>/demo/seed<n>.json`` (its ``report.json``)."""
    rows = []
    for path in sorted(folder.glob("*/demo/seed*.json")):
        report = results.load(path)
        of, rebuilt = report["results"], report["reconstruction_of_held_out_scans"]
        rows.append(
            [
                str(report["seed"]),
                f"{100 * of['best_of_all']:.1f} %",
                f"{100 * of['single_draw']:.1f} %",
                str(of["prompts"]),
                f"{100 * report['judge']['accuracy_on_real_test_scans']:.1f} %",
                f"{rebuilt['psnr_db']:.1f} dB, {100 * rebuilt['judge_accuracy_on_reconstructions']:.1f} %",
                f"{report['timings']['total_seconds']:.0f} s, {report['environment']['torch_threads']}",
            ]
        )
    header = ["seed", "best of 16 by CapLoss is right", "one unranked drawing is right", "prompts"]
    header += ["judge on real scans", "held-out scans rebuilt: PSNR, judge reads", "time, CPU threads"]
    return "\n".join(_markdown_table(header, rows)) + "\n" if rows else f"The demo is {UNMEASURED}.\n"


def put_between_markers(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """``text`` with ``block`` between the markers."""
    pattern = re.escape(begin) + r".*?" + re.escape(end)
    replaced, count = re.subn(pattern, lambda _: f"{begin}\n\n{block}\n{end}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md must hold the markers {begin} and {end} once, got {count}")
    return replaced


def generate(*, check: bool = False, root: Path = ROOT) -> list[str]:
    """Writes what does not match the results files, or only names it under ``check``."""
    folder = root / "benchmarks" / "results"
    everything = {name: quotable(documents) for name, documents in results.load_all(folder).items()}
    everything = {name: documents for name, documents in everything.items() if documents}
    readme = root / "README.md"
    text = put_between_markers(readme.read_text(), summary(everything))
    pages = {readme: put_between_markers(text, demo_section(folder), DEMO_BEGIN, DEMO_END)}
    pages[folder / "README.md"] = results_page(everything)
    pages |= {folder / name / "README.md": device_page(documents) for name, documents in everything.items()}
    stale = []
    for name, documents in everything.items():
        drawn: list[tuple[str, Callable[[Any, Path], None], Any]] = [(CHART, plots.of_device, documents)]
        drawn += [(f"{op}.png", plots.of_op, of) for op, of in documents.items() if of["rows"]]
        for file, draw, source in drawn:
            path = folder / name / file
            if not plots.is_current(path, source):
                stale.append(path)
                if not check:
                    draw(source, path)
    for path, text in pages.items():
        if not path.exists() or path.read_text() != text:
            stale.append(path)
            if not check:
                results.write(path, text)
    return [str(path.relative_to(root)) for path in stale]


def quotable(documents: dict[str, Document]) -> dict[str, Document]:
    """Without those that may not be quoted; each of these is named with the reason."""
    kept = {}
    for op, document in documents.items():
        if reason := results.not_quotable(document):
            print(f"left, not to be quoted: {op}: {reason}")
        else:
            kept[op] = document
    return kept


def tested(source: Path) -> dict[str, Document]:
    """The documents of a results.json, with the verdict of the tests.xml beside it."""
    tests, documents = source.with_name("tests.xml"), results.load(source)
    for op, document in documents.items():
        found = (
            verdict.of_report(op, tests) if tests.exists() else f"there is no {tests} to tell of its tests"
        )
        document["red_tests"] = document["red_tests"] or found
    return documents


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is stale")
    parser.add_argument("--import", dest="source", type=Path, help="results.json of make gpu-check")
    arguments = parser.parse_args()
    if arguments.source:
        for document in quotable(tested(arguments.source)).values():
            print(f"taken: {results.save(document)}")
    stale = generate(check=arguments.check)
    for path in stale:
        print(f"{'stale' if arguments.check else 'written'}: {path}")
    if arguments.check and stale:
        print("run `python -m benchmarks.report`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
