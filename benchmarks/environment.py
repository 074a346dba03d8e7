# SPDX-License-Identifier: Apache-2.0
"""Where a result comes from: device, versions, commit, and the conditions that sway a timing."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

# Fresh pages for every tensor are the largest part of a memory-bound op's time under glibc's defaults; kept
# pages put all variants on the same footing. `python -m benchmarks` sets these for CPU runs.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def device_folder(name: str) -> str:
    """``NVIDIA H200`` -> ``nvidia-h200``, ``Intel(R) Xeon(R) Processor`` -> ``intel-xeon``."""
    name = re.sub(r"\((R|TM|tm)\)|\b(CPU|Processor)\b|@.*", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def allocator() -> str:
    preload = Path(os.environ.get("LD_PRELOAD", "")).name
    settings = [
        f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("MALLOC_", "GLIBC_TUNABLES"))
    ]
    return f"{preload or 'the system malloc'}, {' '.join(settings) or 'default settings'}"


def describe(device: torch.device) -> dict[str, Any]:
    """The ``environment`` block of a results file."""
    from cogview_kernels import _extension

    native = _extension.native
    block: dict[str, Any] = {
        "device": device_name(device),
        "folder": device_folder(device_name(device)),
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": None,
        "extension": "missing" if native is None else f"{native.isa()}, CUDA {bool(_extension.has_cuda)}",
        "commit": _first_line("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "modified": bool(
            _first_line("git", "status", "--porcelain", "--", "cogview_kernels", "csrc", "benchmarks/*.py")
        ),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        block["driver"] = (
            _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None
        )
        block["capability"] = f"{properties.major}.{properties.minor}"
        block["clocks"] = _first_line(
            "nvidia-smi",
            "--query-gpu=clocks.sm,clocks.mem,power.limit,temperature.gpu",
            "--format=csv,noheader",
        )
        block["allocator"] = (
            f"torch caching allocator, PYTORCH_CUDA_ALLOC_CONF={os.environ.get('PYTORCH_CUDA_ALLOC_CONF', '')}"
        )
    else:
        block["allocator"] = allocator()
    return block
