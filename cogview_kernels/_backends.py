# SPDX-License-Identifier: Apache-2.0
"""Backend names, what is available here and why not, and the default for a device.

An explicit ``backend=`` runs or raises. Without one the first of the op's backends that serves the
device is taken. ``COGVIEW_KERNELS_TRACE=1`` prints each choice with the reasons against the others.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

from cogview_kernels import _extension

BACKENDS = ("cpu", "triton", "cuda", "sdpa", "chunked", "reference")

# Read once: asking the environment at every call costs as much as choosing.
TRACE = os.environ.get("COGVIEW_KERNELS_TRACE", "0") not in ("", "0")
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def why_not(backend: str, device: torch.device) -> str:
    """The reason why ``backend`` cannot serve tensors on ``device``; empty when it can."""
    if backend in ("reference", "sdpa", "chunked"):
        return ""
    if backend == "cpu":
        if device.type != "cpu":
            return f"the cpu backend serves CPU tensors, these are on {device}"
        return _extension.missing_reason
    if backend == "triton":
        if not _TRITON_INSTALLED:
            return "triton is not installed (pip install triton)"
        if TRITON_INTERPRETED:
            return ""
        if device.type != "cuda":
            return (
                f"triton serves NVIDIA GPUs, these tensors are on {device}; TRITON_INTERPRET=1 interprets it"
            )
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "triton has no matrix units below compute capability 8.0; the cuda backend serves this GPU"
        return ""
    if backend == "cuda":
        if device.type != "cuda":
            return f"the cuda backend serves NVIDIA GPUs, these tensors are on {device}"
        if _extension.native is None:
            return _extension.missing_reason
        if not _extension.has_cuda:
            return "the extension was built without its CUDA part (no nvcc was found then)"
        return ""
    return f"no such backend; there are {', '.join(BACKENDS)}"


def _preference(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return ("triton", "cuda", "sdpa", "chunked", "reference")
        return ("cuda", "sdpa", "chunked", "reference")
    if device.type == "cpu":
        return ("cpu", "sdpa", "chunked", "reference")
    return ("sdpa", "chunked", "reference")


# A plain dictionary: torch.compile traces it without the warning that functools.cache draws.
_defaults: dict[tuple[str, tuple[str, ...], torch.device], str] = {}


def _default(op: str, supported: tuple[str, ...], device: torch.device) -> str:
    refused: list[tuple[str, str]] = []
    for backend in _preference(device):
        reason = why_not(backend, device) if backend in supported else "not written for this op"
        if not reason:
            if TRACE:
                against = "".join(f"\n  not {name}: {why}" for name, why in refused)
                print(f"cogview_kernels: {op} on {device}: {backend}{against}", file=sys.stderr)
            return backend
        refused.append((backend, reason))
    raise AssertionError("every op has a reference")


def choose(op: str, supported: tuple[str, ...], backend: str | None, device: torch.device) -> str:
    """The backend that runs ``op``; ``supported`` are those written for it.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        NotImplementedError: it is, but not written for this op.
        RuntimeError: it cannot run here; the message says why and the way out.
    """
    if backend is None:
        chosen = _defaults.get((op, supported, device))
        if chosen is None:
            chosen = _defaults[op, supported, device] = _default(op, supported, device)
        return chosen
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend not in supported:
        raise NotImplementedError(f"{op}: no {backend} backend; this op has {', '.join(supported)}")
    if reason := why_not(backend, device):
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
    if TRACE:
        print(f"cogview_kernels: {op} on {device}: {backend}, as asked", file=sys.stderr)
    return backend
