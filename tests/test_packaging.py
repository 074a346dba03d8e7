# SPDX-License-Identifier: Apache-2.0
"""What is handed out is whole, and installs where there is no compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def setup(*arguments, cwd=ROOT, **environment):
    ours = ("COGVIEW_", "CXX", "NVCC", "CUDA_HOME")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
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
    assert not [name for name in names if name.startswith("tests/")]


def test_without_a_compiler_the_python_part_remains(tmp_path):
    done = setup("--name", PATH=str(tmp_path))
    assert done.returncode == 0 and "no g++, building without the compiled extension" in done.stdout
    done = setup("--name", PATH=str(tmp_path), CXX="clang++")
    assert done.returncode != 0 and "the C++ compiler clang++ was not found" in done.stderr


def test_pytorch_is_pinned_in_one_place():
    assert not re.search(r"torch==\d", (ROOT / "Makefile").read_text())
    done = subprocess.run(["make", "-n", "-B", "setup"], cwd=ROOT, capture_output=True, text=True, check=True)
    (pin,) = re.findall(r"^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert done.stdout.count(f"'{pin}+cpu'") == 2


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_a_number_of_threads_that_is_none_is_one_clear_line(threads):
    command = ["make", "-n", "seeds", f"THREADS={threads}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"THREADS must be a whole number of at least 1, got '{threads}'" in done.stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build reads, in a folder with a difficult name, and a compiler that does nothing."""
    folder = tmp_path / "my $1: kernels"
    folder.mkdir()
    (folder / "cogview_kernels").mkdir()
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "cogview_kernels/__init__.py"):
        shutil.copy(ROOT / name, folder / name)
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\nwhile [ $# -gt 0 ]; do case "$1" in -o|-MF) : > "$2";; esac; shift; done\n'
    )
    compiler.chmod(0o755)
    return folder


def build(checkout, **environment):
    options = {"COGVIEW_CUDA": "0", "CXX": str(checkout.parent / "compiler"), **environment}
    return setup("-q", "build_ext", "--inplace", cwd=checkout, **options)


def test_a_checkout_may_lie_in_any_folder(checkout):
    done = build(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((checkout / "cogview_kernels").glob("_C*.so"))


def test_what_does_not_compile_tells_the_way_out(checkout):
    (checkout.parent / "compiler").write_text("#!/bin/sh\nexit 1\n")
    done = build(checkout)
    assert done.returncode != 0 and "COGVIEW_SKIP_EXTENSION=1 installs" in done.stderr.splitlines()[-1]


def nvcc(folder, knows):
    """An nvcc that only tells what it knows."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho compute_{knows}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"NVCC": "/nowhere/nvcc"}, "NVCC=/nowhere/nvcc was not found: name an nvcc, or unset NVCC"),
        ({"COGVIEW_CUDA_ARCHS": "sm_80"}, "must be capabilities without the dot, as 70;90, got sm_80"),
        ({"COGVIEW_CUDA_ARCHS": "90"}, "names [90], which {}/cuda/bin/nvcc does not know; it knows [80]"),
    ],
)
def test_a_wrong_nvcc_is_one_clear_line(checkout, tmp_path, environment, line):
    """CUDA_HOME comes before PATH, as it does for PyTorch's extensions."""
    nvcc(tmp_path / "cuda", 80)
    path = f"{nvcc(tmp_path / 'other', 90).parent}:{os.environ['PATH']}"
    options = {"COGVIEW_CUDA": "1", "CUDA_HOME": str(tmp_path / "cuda"), "PATH": path, **environment}
    done = build(checkout, **options)
    assert done.returncode != 0 and line.format(tmp_path) in done.stderr.splitlines()[-1]
