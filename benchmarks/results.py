# SPDX-License-Identifier: Apache-2.0
"""Results files: ``benchmarks/results/<device>/<op>.json``, one run of one op each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"


def write_json(path: Path, document: Any) -> None:
    """Written aside and renamed: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    os.replace(aside, path)


def save(document: dict[str, Any], folder: Path = FOLDER) -> Path:
    path = folder / document["environment"]["folder"] / f"{document['op']}.json"
    write_json(path, document)
    return path


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def load_all(folder: Path = FOLDER) -> dict[str, dict[str, dict[str, Any]]]:
    """device folder -> op -> document, in alphabetical order."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = load(path)
    return found
