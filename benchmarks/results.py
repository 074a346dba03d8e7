# SPDX-License-Identifier: Apache-2.0
"""The results files, ``benchmarks/results/<device>/<op>.json``: one run of one op each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Document = dict[str, Any]

FOLDER = Path(__file__).resolve().parent / "results"


def write(path: Path, text: str) -> None:
    """Written aside and renamed: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text)
    os.replace(aside, path)


def write_json(path: Path, document: Any) -> None:
    write(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def save(document: Document, folder: Path = FOLDER) -> Path:
    path = folder / document["environment"]["folder"] / f"{document['op']}.json"
    write_json(path, document)
    return path


def load(path: Path) -> Document:
    return json.loads(path.read_text())


def load_all(folder: Path = FOLDER) -> dict[str, dict[str, Document]]:
    """device folder -> op -> document, in alphabetical order."""
    found: dict[str, dict[str, Document]] = {}
    for path in sorted(folder.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = load(path)
    return found


def not_quotable(document: Document) -> str:
    """Why the figures may not be quoted, or ""."""
    return "the shapes are tiny" if document["tiny"] else document["red_tests"]


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


def fastest_rival(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row["kind"] == "rival"), None)
