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


def _first_line(command: str) -> str:
    try:
        done = subprocess.run(command.split(), capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""


def _nvidia_smi(fields: str) -> str:
    return _first_line(f"nvidia-smi --query-gpu={fields} --format=csv,noheader")


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
    """A CPU's instruction set is part of it: clouds give one name to several generations."""
    from cogview_kernels import _extension

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    native = _extension.native
    return cpu_name() if native is None else f"{cpu_name()}, {native.isa().upper()}"


def device_folder(name: str) -> str:
    """``NVIDIA H200`` -> ``nvidia-h200``, ``Intel(R) Xeon(R) Processor, AMX`` -> ``intel-xeon-amx``."""
    name = re.sub(r"\((R|TM|tm)\)|\b(CPU|Processor)\b|@.*", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def allocator(device: torch.device) -> str:
    if device.type == "cuda":
        return f"PyTorch's caching allocator {os.environ.get('PYTORCH_CUDA_ALLOC_CONF', '')}".strip()
    names = sorted(name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES")))
    settings = " ".join(f"{name}={os.environ[name]}" for name in names)
    return f"{Path(os.environ.get('LD_PRELOAD', '')).name or 'system malloc'} {settings or 'as it comes'}"


def describe(device: torch.device) -> dict[str, Any]:
    """The ``environment`` block of a results file."""
    from cogview_kernels import _extension

    native = _extension.native
    block: dict[str, Any] = {
        "device": device_name(device),
        "folder": device_folder(device_name(device)),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _first_line("git rev-parse --short=12 HEAD") or "unknown",
        "modified": bool(_first_line("git status --porcelain -- cogview_kernels csrc benchmarks/*.py")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "extension": "missing" if native is None else f"{native.isa()}, CUDA part: {_extension.has_cuda}",
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "allocator": allocator(device),
    }
    if device.type == "cuda":
        block["driver"] = _nvidia_smi("driver_version") or "unknown"
        block["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        block["clocks"] = _nvidia_smi("clocks.sm,clocks.mem,power.limit,temperature.gpu") or "unknown"
    return block
