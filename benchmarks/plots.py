# SPDX-License-Identifier: Apache-2.0
"""The plots: an op's cases each in a panel, and a device's headline cases in one chart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks import BENCHMARKS
from benchmarks.results import Document, by_case, fastest_rival, headline, on_gpu, speed

COLOURS = {"backend": "#c2410c", "option": "#fdba74", "rival": "#94a3b8", "bound": "#e2e8f0"}
INK = "#334155"


def fingerprint(source: Any) -> str:
    """Of the results that a plot shows. The plot's metadata keep it, so that a stale plot is known."""
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]


def is_current(path: Path, source: Any) -> bool:
    from PIL import Image

    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get("Source") == fingerprint(source)


def of_op(document: Document, path: Path) -> None:
    """One panel per shape and direction of the first dtype: how many times faster than the baseline."""
    plt = _pyplot()
    dtype = document["rows"][0]["dtype"]
    cases = {key: rows for key, rows in by_case(document).items() if key[2] == dtype}
    shapes = list(dict.fromkeys(key[0] for key in cases))
    directions = list(dict.fromkeys(key[3] for key in cases))
    most = max(len(rows) for rows in cases.values())
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
        axis.axvline(1.0, color=INK, linewidth=0.8, linestyle=":", zorder=0)
        axis.set_xlim(0, max(speeds) * (1.45 if on_gpu(document) else 1.25))
        for i, (value, row) in enumerate(zip(speeds, rows, strict=True)):
            label = f" {value:.2f}x" + (f"  {row['ms']:.3g} ms" if on_gpu(document) else "")
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axis.text(value, i, label, va="center", fontsize=8, color=INK, bbox=box)
        axis.set_title(f"{shape}, {direction}", fontsize=10, loc="left")
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    for axis in axes.flat:
        axis.set_visible(bool(axis.has_data()))
    for axis in axes[-1]:
        axis.set_xlabel(f"times faster than {document['baseline']}")
    e = document["environment"]
    figure.suptitle(f"{document['op']}, {dtype}, {e['device']}", x=0.01, ha="left", fontweight="bold")
    _save(figure, path, document)


def of_device(documents: dict[str, Document], path: Path) -> None:
    """One bar per headline case: how many times faster than the fastest rival."""
    plt = _pyplot()
    lines = []
    for op in BENCHMARKS:
        for (shape, _, dtype, direction), ours, rows in headline(documents[op]) if op in documents else []:
            if rival := fastest_rival(rows):
                gain = rival["ms"] / ours["ms"]
                lines.append((f"{op}, {shape}, {dtype}, {direction}", gain, rival["variant"]))
    figure, axis = plt.subplots(figsize=(10, 0.27 * len(lines) + 1.2), layout="constrained")
    axis.barh(range(len(lines)), [gain for _, gain, _ in lines], color=COLOURS["backend"], height=0.72)
    axis.set_yticks(range(len(lines)), [name for name, _, _ in lines])
    for i, (_, gain, rival) in enumerate(lines):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.text(gain, i, f" {gain:.2f}x {rival}", va="center", fontsize=8, color=INK, bbox=box)
    axis.invert_yaxis()
    axis.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
    axis.set_xlim(0, 1.35 * max([gain for _, gain, _ in lines], default=1.0))
    axis.set_xlabel("times faster than the fastest rival, which is named behind the bar; left of 1: slower")
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    device = next(iter(documents.values()))["environment"]["device"]
    figure.suptitle(device, x=0.01, ha="left", fontweight="bold")
    _save(figure, path, documents)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans"})
    return plt


def _save(figure: Any, path: Path, source: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    metadata = {"Software": None, "Source": fingerprint(source)}
    figure.savefig(aside, format="png", dpi=110, metadata=metadata)
    _pyplot().close(figure)
    aside.replace(path)
