# SPDX-License-Identifier: Apache-2.0
"""What a user would otherwise run, one file per op; run on the CPU too, so that the code is exercised."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any


def needs(module: str, *, gpu: bool = False) -> Callable[[Any, Any], str]:
    """A ``why_not``: the reason why ``module`` cannot be used, or ""."""

    def why_not(case: Any, device: Any) -> str:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        return f"{module} needs an NVIDIA GPU" if gpu and device.type != "cuda" else ""

    return why_not
