# SPDX-License-Identifier: Apache-2.0
"""What is handed out is whole, and installs where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def setup(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COGVIEW_", "CXX"))}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**kept, **environment},
    )


def test_a_source_distribution_holds_every_source(tmp_path):
    done = setup("-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for folder, suffixes in (("csrc", {".cpp", ".h", ".cu", ".cuh"}), ("cogview_kernels", {".py", ".pyi"})):
        sources = {
            str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.suffix in suffixes
        }
        assert sources and sources <= names, sorted(sources - names)


def test_without_a_compiler_the_python_part_remains(tmp_path):
    done = setup("--name", PATH=str(tmp_path))
    assert done.returncode == 0 and "no g++, building without the compiled extension" in done.stdout
    done = setup("--name", PATH=str(tmp_path), CXX="clang++")
    assert done.returncode != 0 and "the C++ compiler clang++ was not found" in done.stderr


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_a_number_of_threads_that_is_none_is_one_clear_line(threads):
    command = ["make", "-n", "seeds", f"THREADS={threads}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"THREADS must be a whole number of at least 1, got '{threads}'" in done.stderr
