# SPDX-License-Identifier: Apache-2.0
"""Where a model runs unless told otherwise."""

from __future__ import annotations

import torch


def default_device() -> str:
    """``"cuda"`` where an NVIDIA GPU answers, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"
