# SPDX-License-Identifier: Apache-2.0
"""The site that ``make docs`` builds, by Sphinx: pages in Markdown, reference from docstrings."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cogview_kernels

project = "cogview_kernels"
copyright = "the cogview_kernels authors, Apache-2.0"
version = release = cogview_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["substitution"]
myst_heading_anchors = 2
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
add_module_names = False
html_theme = "furo"
html_title = f"cogview_kernels {release}"
html_static_path: list[str] = []


def _support_matrix() -> str:
    """Which backends each op has, from the ops themselves."""
    columns = ("cpu", "triton", "cuda", "sdpa", "chunked", "reference")
    lines = ["| op | " + " | ".join(columns) + " |", "|---|" + ":-:|" * len(columns)]
    for op in cogview_kernels.__all__:
        if not op[0].islower():
            continue
        backends = importlib.import_module(f"cogview_kernels.{op}.api")._BACKENDS
        marks = " | ".join("yes" if name in backends else "" for name in columns)
        lines.append(f"| `{op}` | {marks} |")
    return "\n".join(lines)


myst_substitutions = {"support_matrix": _support_matrix()}
