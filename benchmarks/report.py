# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and plots from the results files; nothing in them is typed by hand.

``python -m benchmarks.report``            README.md between its markers, results/<device>/README.md, plots
``python -m benchmarks.report --check``    exit status 1 if any of these does not match the results files
``python -m benchmarks.report --import F`` first take the results in F, as ``make gpu-check`` writes them
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import OPS, results, tiles

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks: written by `python -m benchmarks.report` -->", "<!-- /benchmarks -->"
DEMO_BEGIN, DEMO_END = "<!-- demo: written by `python -m benchmarks.report` -->", "<!-- /demo -->"
UNMEASURED = "unmeasured"

COLOURS = {"backend": "#c2410c", "rival": "#94a3b8", "bound": "#e2e8f0"}

Document = dict[str, Any]
Row = dict[str, Any]


def on_gpu(document: Document) -> bool:
    return "capability" in document["environment"]


def by_case(document: Document) -> dict[tuple[str, str, str, str], list[Row]]:
    """(shape, sizes, dtype, direction) -> rows, fastest first."""
    cases: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in document["rows"]:
        cases.setdefault((row["shape"], row["sizes"], row["dtype"], row["direction"]), []).append(row)
    return {key: sorted(rows, key=lambda row: row["ms"]) for key, rows in cases.items()}


def speed(row: Row, rows: list[Row], baseline: str) -> float | None:
    """How many times faster than the baseline of the same case, or None."""
    base = next((r["ms"] for r in rows if r["variant"] == baseline), None)
    return None if base is None else base / row["ms"]


def speed_text(row: Row, rows: list[Row], baseline: str) -> str:
    """With "~" where the quartiles of either time lie more than a fifth of the median apart."""
    pair = [r for r in rows if r is row or r["variant"] == baseline]
    unsteady = any(r["ms_quartiles"][1] - r["ms_quartiles"][0] > 0.2 * r["ms"] for r in pair)
    return ("~" if unsteady else "") + _number(speed(row, rows, baseline), "x")


def extra_bytes(row: Row) -> int | None:
    """Peak memory beyond inputs and results."""
    return None if row["peak_bytes"] is None else max(0, row["peak_bytes"] - row["result_bytes"])


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
    gpu = on_gpu(document)
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
    lines = [f"\nNOT TO BE QUOTED: {document['red_tests']}"] if document.get("red_tests") else []
    for (shape, sizes, dtype, direction), rows in by_case(document).items():
        header, table = columns(document, rows)
        widths = [max(len(line[i]) for line in [header, *table]) for i in range(len(header))]
        lines.append(f"\n{document['op']}, {shape} ({sizes}), {dtype}, {direction}")
        for line in [header, *table]:
            cells = [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
            lines.append("  " + "  ".join(cells))
    return "\n".join(lines)


def short_lines(document: Document) -> list[str]:
    """One line per case of :func:`headline`."""
    lines = []
    for (shape, _, dtype, direction), ours, rows in headline(document):
        rival = next((row for row in rows if row["kind"] == "rival"), None)
        against = f", {_number(rival['ms'] / ours['ms'])}x as fast as {rival['variant']}" if rival else ""
        share = f"{100 * ours['share_of_ceiling']:.0f} % of ceiling"
        name = f"{document['op']} {shape} {dtype} {direction}"
        share += " (its tests are RED)" if document.get("red_tests") else ""
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
    if on_gpu(document):
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


def device_page(folder: str, documents: dict[str, Document]) -> str:
    """``benchmarks/results/<device>/README.md``: every row and every reason."""
    first = next(iter(documents.values()))
    lines = [
        f"# {first['environment']['device']}",
        "",
        "Written by `python -m benchmarks.report` from the JSON files beside it. What the columns mean is in",
        "[benchmarks/README.md](../../README.md).",
    ]
    for op in OPS:
        lines += ["", f"## {op}", ""]
        if op not in documents:
            lines.append(f"{UNMEASURED.capitalize()} on this device.")
            continue
        document = documents[op]
        lines += [*_environment_lines(document), "", f"![{op}]({op}.png)"]
        for (shape, sizes, dtype, direction), rows in by_case(document).items():
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
        if reasons:
            lines += ["", "Not timed:", ""]
            lines += [f"- {variant}, {count} cases: {reason}" for (variant, reason), count in reasons.items()]
    return "\n".join(lines) + "\n"


def headline(document: Document) -> list[tuple[tuple[str, str, str, str], Row, list[Row]]]:
    """Per shape and direction of the first dtype: our fastest backend and the rows it races."""
    cases = by_case(document)
    dtype = document["rows"][0]["dtype"] if document["rows"] else ""
    found = []
    for key, rows in cases.items():
        ours = [row for row in rows if row["kind"] == "backend"]
        if key[2] == dtype and ours:
            found.append((key, ours[0], rows))
    return found


def summary(all_documents: dict[str, dict[str, Document]]) -> str:
    """The block between README.md's markers."""
    lines = []
    if not any(on_gpu(next(iter(documents.values()))) for documents in all_documents.values()):
        lines += [f"GPU: {UNMEASURED}. `make gpu-check OUT=folder` measures it where there is one.", ""]
    for folder, documents in all_documents.items():
        first = next(iter(documents.values()))
        device = first["environment"]["device"]
        lines += [f"**{device}** ([all rows](benchmarks/results/{folder}/README.md))", ""]
        table = [row for op in OPS for row in _summary_rows(op, documents.get(op), on_gpu(first))]
        header = ["op", "shape, dtype, direction", "backend", "fastest rival", "times faster", "against"]
        lines += [*_markdown_table([*header, *(["ms"] if on_gpu(first) else [])], table, text=4), ""]
    lines += [tiles.markdown()]
    return "\n".join(lines).rstrip() + "\n"


def _summary_rows(op: str, document: Document | None, gpu: bool) -> list[list[str]]:
    if document is None:
        return [[op, UNMEASURED, *[""] * (5 if gpu else 4)]]
    rows = []
    for (shape, _, dtype, direction), ours, raced in headline(document):
        rival = next((row for row in raced if row["kind"] == "rival"), None)
        line = [op, f"{shape}, {dtype}, {direction}", ours["variant"]]
        line += [rival["variant"], speed_text(ours, raced, rival["variant"])] if rival else ["", UNMEASURED]
        line.append(f"{document['baseline']}: {speed_text(ours, raced, document['baseline'])}")
        rows.append([*line, _number(ours["ms"])] if gpu else line)
    return rows


def fingerprint(document: Document) -> str:
    """Kept in a plot's metadata, so that a stale plot is known."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def plot(document: Document, path: Path) -> None:
    """One panel per shape and direction of the first dtype: how many times faster than the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtype = document["rows"][0]["dtype"]
    cases = {key: rows for key, rows in by_case(document).items() if key[2] == dtype}
    shapes = list(dict.fromkeys(key[0] for key in cases))
    directions = list(dict.fromkeys(key[3] for key in cases))
    most = max(len(rows) for rows in cases.values())
    plt.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(
        len(shapes),
        len(directions),
        figsize=(4.6 * len(directions) + 1, (0.27 * most + 0.75) * len(shapes) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for (shape, _, _, direction), rows in cases.items():
        axis = axes[shapes.index(shape)][directions.index(direction)]
        speeds = [speed(row, rows, document["baseline"]) or 0.0 for row in rows]
        colours = [COLOURS[row["kind"]] for row in rows]
        axis.barh(range(len(rows)), speeds, color=colours, height=0.72)
        axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
        for tick, row in zip(axis.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if row["kind"] == "backend" else "normal")
        axis.invert_yaxis()
        axis.axvline(1.0, color="#334155", linewidth=0.8, linestyle=":", zorder=0)
        axis.set_xlim(0, max(speeds) * (1.45 if on_gpu(document) else 1.25))
        for i, (value, row) in enumerate(zip(speeds, rows, strict=True)):
            label = f" {value:.2f}x" + (f"  {_number(row['ms'])} ms" if on_gpu(document) else "")
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axis.text(value, i, label, va="center", fontsize=8, color="#334155", bbox=box)
        axis.set_title(f"{shape}, {direction}", fontsize=10, loc="left")
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    for axis in axes.flat:
        axis.set_visible(bool(axis.has_data()))
    for axis in axes[-1]:
        axis.set_xlabel(f"times faster than {document['baseline']}")
    e = document["environment"]
    figure.suptitle(f"{document['op']}, {dtype}, {e['device']}", x=0.01, ha="left", fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    metadata = {"Software": None, "Source": fingerprint(document)}
    figure.savefig(aside, format="png", dpi=110, metadata=metadata)
    plt.close(figure)
    aside.replace(path)


def plot_is_current(document: Document, path: Path) -> bool:
    from PIL import Image

    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get("Source") == fingerprint(document)


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
    everything = results.load_all(folder)
    readme = root / "README.md"
    text = put_between_markers(readme.read_text(), summary(everything))
    wanted = {readme: put_between_markers(text, demo_section(folder), DEMO_BEGIN, DEMO_END)}
    stale = []
    for name, documents in everything.items():
        wanted[folder / name / "README.md"] = device_page(name, documents)
        for op, document in documents.items():
            path = folder / name / f"{op}.png"
            if document["rows"] and not plot_is_current(document, path):
                stale.append(str(path.relative_to(root)))
                if not check:
                    plot(document, path)
    for path, text in wanted.items():
        if not path.exists() or path.read_text() != text:
            stale.append(str(path.relative_to(root)))
            if not check:
                aside = path.with_name(path.name + ".part")
                aside.write_text(text)
                aside.replace(path)
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is stale")
    parser.add_argument("--import", dest="source", type=Path, help="results.json of make gpu-check")
    arguments = parser.parse_args()
    if arguments.source:
        for document in results.load(arguments.source).values():
            if document.get("red_tests"):
                print(f"left, not to be quoted: {document['red_tests']}")
            else:
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
