# SPDX-License-Identifier: Apache-2.0
"""What ``torchrun`` tells the processes that it starts, its ranks. Read before PyTorch is loaded."""

from __future__ import annotations

import os


def started_ranks() -> int:
    """How many processes were started to train together; 1 without ``torchrun``."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def started_as_first() -> bool:
    """Whether this process is the one of them that speaks, or is alone."""
    return started_ranks() == 1 or os.environ["RANK"] == "0"


def own_gpu() -> str:
    """The GPU of this process among those of its machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if started_ranks() > 1 else "cuda"
