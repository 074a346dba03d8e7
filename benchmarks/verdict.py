# SPDX-License-Identifier: Apache-2.0
"""Whether an op's own tests are green: without that its figures are not to be quoted."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def of_tests(op: str) -> str:
    """Runs the op's tests once. "" when they are green, else one line: why the op is not to be quoted."""
    files = sorted((ROOT / "tests").glob(f"*/test_{op}*.py"))
    if not files:
        return f"{op} has no tests (tests/*/test_{op}.py)"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        pytest = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
        command = [*pytest, f"--junitxml={report}", *map(str, files)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if report.exists() and (found := of_report(op, report)):
            return found
    if done.returncode == 0:
        return ""
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    return f"the tests of {op} ended with exit status {done.returncode}: {' '.join(last)}"


def of_report(op: str, report: Path) -> str:
    """The same, read from the JUnit XML of an earlier run of the tests."""
    cases = [
        case
        for case in ElementTree.parse(report).iter("testcase")
        # A file that cannot be imported has its name in "name" and no "classname".
        if str(case.get("classname") or case.get("name")).split(".")[-1].startswith(f"test_{op}")
    ]
    red = [case.get("name") for case in cases if any(child.tag in ("failure", "error") for child in case)]
    if all(any(child.tag == "skipped" for child in case) for case in cases):
        return f"{report} holds no test of {op} that ran"
    return f"{len(red)} tests of {op} are red: {', '.join(map(str, red[:5]))}" if red else ""
