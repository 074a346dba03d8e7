# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: everything is written aside and then renamed.

A kill at any moment therefore leaves the previous file, never half of the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # The settings of a run are read before PyTorch is loaded.
    from torch import Tensor

StrPath = str | os.PathLike[str]


@contextmanager
def written_aside(path: StrPath) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` when the block ends without an error.

    Missing folders are made. After an error ``path`` is as it was and nothing else is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_written_aside(path: StrPath) -> Iterator[Path]:
    """An empty folder to fill, which becomes ``path`` when the block ends without an error.

    ``path`` must not exist. Missing folders above it are made. After an error nothing is left behind.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_bytes(path: StrPath, content: bytes) -> None:
    """Write bytes aside and rename."""
    with written_aside(path) as aside:
        aside.write_bytes(content)


def write_text(path: StrPath, content: str) -> None:
    """Write text as UTF-8 aside and rename."""
    write_bytes(path, content.encode())


def write_json(path: StrPath, content: Any) -> None:
    """Write JSON aside and rename."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: StrPath) -> Any:
    """Read JSON. FileNotFoundError if absent, ValueError if damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"file not found: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def save_tensors(path: StrPath, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors, aside and then renamed."""
    from safetensors.torch import save_file

    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_aside(path) as aside:
        save_file(content, aside)


def load_tensors(path: StrPath) -> dict[str, Tensor]:
    """Read a safetensors file. FileNotFoundError if absent, ValueError if damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights not found: {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from None
