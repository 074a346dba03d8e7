# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: read from the sources, and proved in fresh interpreters."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "cogview_kernels"
MODEL = ROOT / "cogview"
OPS = sorted(p.parent.name for p in KERNELS.glob("*/api.py"))
OURS = ("torch", "typing_extensions", "cogview_kernels", "triton")  # PyTorch needs the second itself

# An op that is made of others, and of which. Its reference calls theirs, its C++ file their functions.
MADE_OF = {
    "decode_step": ("decode_attention", "decode_linear", "layer_norm", "sandwich_layer_norm"),
    "draw_step": ("decode_step", "draw_tokens"),
}

# What each file of an op may import of its own op. Any may import the shared modules, `layout` and `_*`.
ALLOWED = {
    "__init__": {"api", "stack"},
    "api": {"op", "reference", "sdpa", "window", "objective", "stack"},
    "op": {"native", "triton_kernels", "chunked", "pieces", "window", "objective"},
    "chunked": {"pieces", "objective"},
    "pieces": {"objective"},
    "reference": {"window", "objective"},
    "native": {"chunked", "pieces", "window", "objective"},
    "sdpa": {"reference", "window"},
    "stack": {"native"},
    "window": set(),
    "objective": set(),
    "triton_kernels": {
        "launch_config",
        "native",
        "pieces",
        "index_triton",
        "forward_hopper",
        "forward_triton",
        "backward_triton",
        "window",
        "objective",
    },
    "forward_hopper": set(),
    "index_triton": set(),
    "forward_triton": {"index_triton"},
    "backward_triton": {"forward_triton", "index_triton"},
    "launch_config": set(),
    "tune": {"api", "forward_hopper", "launch_config"},
}


def imports(path: Path) -> list[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def fresh_interpreter(code: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=_env(environment)
    )
    assert done.returncode == 0, done.stderr


def _env(extra: dict[str, str]) -> dict[str, str]:
    import os

    return {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **extra}


OF_OPS = sorted(p for p in KERNELS.glob("*/*.py") if p.parent.name != "integrations")


@pytest.mark.parametrize("path", OF_OPS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_inside_an_op(path):
    for name in imports(path):
        if not name.startswith("cogview_kernels."):
            assert not name.startswith("cogview."), f"{path} imports the model package: {name}"
            continue
        part = name.split(".")[1]
        if part.startswith("_") or part == "layout":
            continue
        if part in MADE_OF.get(path.parent.name, ()) and path.stem == "reference":
            assert name.split(".")[2] == "reference", f"{path} may not import {name}"
            continue
        assert part == path.parent.name, f"{path}: ops never import one another ({name})"
        module = name.split(".")[2] if len(name.split(".")) > 2 else ""
        assert module in ALLOWED[path.stem], f"{path.name} may not import {name}"


# The rooms and modules of cogview, floor by floor from below. A module imports its own room and the floors
# below it. The modules of the lowest floor may import one another.
FLOORS = [
    {
        "files",
        "folder_lock",
        "config",
        "seeding",
        "launch",
        "device",
        "progress",
        "presets",
        "settings",
        "weights",
        "images",
        "terminal",
    },
    {"tokens", "model"},
    {"data"},
    {"perception"},
    {"training", "generation"},
    {"evaluation"},
    {"run"},
    {"clip_gen_run"},
    {"demo", "options"},
    {"serving"},
    {"commands"},
    {"parsing"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@pytest.mark.parametrize("path", sorted(MODEL.rglob("*.py")), ids=lambda p: str(p.relative_to(MODEL)))
def test_nothing_in_cogview_imports_from_above(path):
    room = path.relative_to(MODEL).parts[0].removesuffix(".py")
    if room == "__init__":
        return  # The front door hands on names from every floor.
    assert room in FLOOR_OF, f"{path}: give {room} a floor in this test"
    for name in imports(path):
        if name.split(".")[0] != "cogview" or name == "cogview":
            continue
        other = name.split(".")[1]
        allowed = FLOOR_OF.get(other, len(FLOORS)) < FLOOR_OF[room] or other == room
        same_ground_floor = FLOOR_OF[room] == 0 == FLOOR_OF.get(other)
        assert allowed or same_ground_floor, f"{path} imports {name}"


def test_cogview_is_imported_without_what_it_may_not_need():
    heavy = "('torch', 'matplotlib', 'sklearn', 'tensorboard', 'PIL')"
    fresh_interpreter(
        "import sys, cogview, cogview.config, cogview.presets, cogview.settings\n"
        f"loaded = [m for m in {heavy} if m in sys.modules]\n"
        "assert not loaded, loaded"
    )


def test_training_on_a_folder_loads_nothing_of_the_digits_or_the_plots(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "captions.tsv").write_text("a.png\tblack")
    fresh_interpreter(
        "import sys, cogview.training.pipeline\n"
        "loaded = [m for m in ('matplotlib', 'sklearn', 'tensorboard', 'PIL') if m in sys.modules]\n"
        "assert not loaded, loaded\n"
        "from cogview.data.pairs import open_pairs\n"
        f"open_pairs({str(tmp_path)!r}).check(8, progress=False)\n"
        "assert 'PIL' in sys.modules\n"
        "loaded = [m for m in ('matplotlib', 'sklearn', 'tensorboard') if m in sys.modules]\n"
        "assert not loaded, loaded"
    )


# The cache's memory is the model's, and a kernel that fills it is no op that others would want. When a module
# may be passed by is one rule for the model and for the integrations.
PRIVATE = {
    ("model/decoder.py", "cogview_kernels._hooks"),
    ("model/transformer.py", "cogview_kernels._hooks"),
    ("model/cache.py", "cogview_kernels._cache"),
    ("model/decoder.py", "cogview_kernels._draw"),
    ("generation/sampling.py", "cogview_kernels._draw"),
    ("training/precision.py", "cogview_kernels._device"),
}


def test_cogview_uses_only_the_public_names():
    import cogview_kernels

    for path in sorted(MODEL.rglob("*.py")):
        for name in imports(path):
            if (str(path.relative_to(MODEL)), name) in PRIVATE:
                continue
            if name.split(".")[0] == "cogview_kernels" and name != "cogview_kernels":
                public = name.removeprefix("cogview_kernels.")
                assert public in cogview_kernels.__all__, f"{path} imports {name}"


def test_kernels_need_only_torch():
    """An integration needs the library that it is named after too, and nothing imports an integration."""
    for path in sorted(KERNELS.rglob("*.py")):
        parts = path.relative_to(KERNELS).with_suffix("").parts
        library = parts[1] if parts[0] == "integrations" else ""
        for name in imports(path):
            root = name.split(".")[0]
            known = root in sys.stdlib_module_names or root in OURS or root == library
            known = known or (path.name == "bench.py" and root == "matplotlib")  # where a plot is asked for
            assert library or not name.startswith("cogview_kernels.integrations"), f"{path} imports {name}"
            assert known, f"{path} imports {name}"
            its_own = path.stem == "triton_kernels" or path.stem.endswith("_triton")
            assert root != "triton" or its_own, f"{path} imports triton"


def test_csrc_knows_no_torch_and_no_other_op():
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        for header in re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text()):
            assert not header.startswith(("torch/", "ATen/", "c10/")), f"{path}: {header}"
            if path.name != "bindings.cpp" and (ROOT / "csrc" / header).exists():
                op, shared = path.parent.name, ["common"]
                if op.endswith("_norm") or op in MADE_OF:
                    shared.append("norms")
                allowed = (*shared, *MADE_OF.get(op, ()), op)
                assert header.split("/")[0] in allowed, f"{path}: {header}"


def test_import_loads_neither_triton_nor_the_model():
    fresh_interpreter(
        "import sys, cogview_kernels\n"
        "loaded = [m for m in sys.modules if m.split('.')[0] in ('triton', 'cogview', 'numpy.testing')]\n"
        "assert not loaded, loaded"
    )


def test_import_survives_without_triton_and_extension():
    fresh_interpreter(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "sys.modules['cogview_kernels._C'] = None\n"
        "import torch, cogview_kernels\n"
        "from cogview_kernels import info\n"
        "x = torch.randn(3, 5)\n"
        "assert torch.allclose(cogview_kernels.stable_softmax(x), torch.softmax(x, -1))\n"
        "try: cogview_kernels.stable_softmax(x, backend='cpu')\n"
        "except RuntimeError as error: assert 'make build' in str(error), error\n"
        "else: raise AssertionError('the cpu backend ran without the extension')\n"
        "assert 'could not be loaded' in info.describe()"
    )


def test_trace_tells_each_choice():
    code = "import torch, cogview_kernels; cogview_kernels.stable_softmax(torch.ones(2, 3))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=_env({"COGVIEW_KERNELS_TRACE": "1"}),
    )
    assert "stable_softmax on cpu" in done.stderr, done.stderr


@pytest.mark.parametrize("op", OPS)
def test_one_name_per_op_everywhere(op):
    import cogview_kernels

    assert op in cogview_kernels.__all__
    assert (ROOT / "tests" / "kernels" / f"test_{op}.py").exists()
    assert f"def {op}(" in (KERNELS / op / "api.py").read_text()
    assert f"def {op}_reference(" in (KERNELS / op / "reference.py").read_text()


def test_every_source_names_its_licence():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and path.exists() and path.stat().st_size:
            assert "SPDX-License-Identifier: Apache-2.0" in path.read_text()[:200], name


def test_the_map_of_the_code_has_every_shared_file_and_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shared = [path.stem for path in KERNELS.glob("_*.py") if path.stem != "__init__"]
    rooms = [path.parent.name for path in MODEL.glob("*/__init__.py")]
    assert [name for name in [*shared, *rooms] if not re.search(rf"(?<![a-z_]){name}(?![a-z_])", text)] == []
