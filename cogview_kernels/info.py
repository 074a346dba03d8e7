# SPDX-License-Identifier: Apache-2.0
"""``python -m cogview_kernels.info``: what can run on this machine, and why the rest cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

import cogview_kernels
from cogview_kernels import _backends, _device, _extension

# docs/v100.md tells why.
_VOLTA = (
    "  Volta needs PyTorch 2.10 (CUDA 12.8), or 2.11 to 2.14 built with CUDA 12.6; a driver of the R570 to\n"
    "  R580 branches; an nvcc of CUDA 12.6 to 12.9 with COGVIEW_CUDA_ARCHS=70. Attention takes float16\n"
    "  alone; local_attention_2d and merge_attention are plain PyTorch there (sdpa and reference)."
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> str:
    """The report as text; never raises, whatever is missing."""
    lines = [
        f"cogview_kernels {cogview_kernels.__version__}",
        f"python          {platform.python_version()} on {platform.machine()}",
        f"torch           {torch.__version__}, CUDA {torch.version.cuda or 'none'}, "
        f"{torch.get_num_threads()} CPU threads",
        f"triton          {_version('triton')}{', interpreted' if _backends.TRITON_INTERPRETED else ''}",
    ]
    if _extension.native is None:
        lines.append(f"extension       {_extension.missing_reason}")
    else:
        lines.append(
            f"extension       CPU part: {_extension.native.isa()}, threads from "
            f"{_extension.native.parallel_runtime()}; "
            f"CUDA part: {'built' if _extension.has_cuda else 'not built'}"
        )
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        name = platform.processor() or platform.machine()
        if device.type == "cuda":
            gpu = _device.properties(device)
            name = f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        lines.append(f"\n{device} ({name})")
        for backend in _backends.BACKENDS:
            reason = _backends.why_not(backend, device)
            lines.append(f"  {backend:<10} {'no: ' + reason if reason else 'yes'}")
        if device.type == "cuda" and _device.capability(device) < (7, 5):
            lines.append(_VOLTA)
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m cogview_kernels.info", description=__doc__).parse_args()
    print(describe())
