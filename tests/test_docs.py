# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/ say what is true: their Python runs, and nothing that they must name is missing."""

from __future__ import annotations

import importlib.util
import logging
import re
import runpy
from pathlib import Path

import pytest

import cogview_kernels

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
EVERY_PAGE = [*sorted(ROOT.glob("*.md")), *PAGES, *sorted((ROOT / "benchmarks").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def quiet_logger():
    logger = logging.getLogger("cogview_kernels")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, quiet_logger):
    namespace = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_runs_and_prints_its_ratio(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    assert re.search(r"ratio: .*\d\.\d\dx as fast", capsys.readouterr().out)


def test_every_example_is_on_its_page():
    page = (ROOT / "docs" / "examples.md").read_text()
    assert {f"examples/{example.name}" for example in EXAMPLES} == set(re.findall(r"examples/\w+\.py", page))


@pytest.mark.parametrize("op", [name for name in cogview_kernels.__all__ if name[0].islower()])
def test_every_op_has_an_example_and_its_reference(op):
    page = (ROOT / "docs" / "ops.md").read_text()
    _, _, section = page.partition(f"\n## {op}\n")
    section = section.split("\n## ")[0]
    assert f"{op}(" in section and f"autofunction:: cogview_kernels.{op}\n" in section


def test_every_environment_variable_is_on_its_page():
    page = (ROOT / "docs" / "environment.md").read_text()
    sources = [ROOT / "setup.py", ROOT / ".ci" / "gpu_check.py"]
    for folder in ("cogview_kernels", "cogview"):
        sources += (ROOT / folder).rglob("*.py")
    pattern = r"(?:environ(?:\.get|\.setdefault)?|is_switched_on)[(\[]\s*[\"']([A-Z][A-Z0-9_]+)"
    read = {name for source in sources for name in re.findall(pattern, source.read_text())}
    # What the shell or this process itself sets, which is no option of ours.
    missing = {name for name in read - {"PATH", "COLUMNS"} if f"{name}" not in page}
    assert "COGVIEW_KERNELS_TRACE" in read and not missing, missing


def test_every_page_is_in_the_contents():
    contents = (ROOT / "docs" / "index.md").read_text().split("{toctree}")[1]
    assert {page.stem for page in PAGES} - {"index"} == set(
        re.findall(r"^([a-z0-9-]+)$", contents, re.MULTILINE)
    )


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_programs_are_there(page):
    text = page.read_text()
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    assert [link for link in sorted(links) if not (page.parent / link).exists()] == []
    ours = {"benchmarks", "cogview", "cogview_kernels", "tests"}
    programs = set(re.findall(r"python -m ([a-z_.]*[a-z_])", text))
    named = [name for name in sorted(programs) if name.split(".")[0] in ours]
    assert [name for name in named if importlib.util.find_spec(name) is None] == []
