# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium for tests, where there is one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def chromium(**page: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page of a new browser, and what its console says. Skips the test, with the reason, without one."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with sync_api.sync_playwright() as driver:
        path = shutil.which("chromium") or shutil.which("google-chrome") or driver.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("needs Chromium: install it, or run python -m playwright install chromium")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            opened, said = browser.new_page(**page), []
            opened.on("console", lambda message: said.append(message.text))
            opened.on("pageerror", lambda error: said.append(str(error)))
            yield opened, said
        finally:
            browser.close()
