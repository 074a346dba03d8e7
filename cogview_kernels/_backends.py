# SPDX-License-Identifier: Apache-2.0
"""Backend names, what is available here and why not, and the default for a device.

An explicit ``backend=`` runs or raises. Without one the first of the op's backends that serves the device and
the arguments is taken. Choices are logged at level DEBUG by the logger ``cogview_kernels``, with the reasons
against the other backends; ``COGVIEW_KERNELS_TRACE=1`` prints these messages on standard error.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from cogview_kernels import _device, _extension

T = TypeVar("T")

BACKENDS = ("cpu", "triton", "cuda", "sdpa", "chunked", "reference")

_ON = ("1", "true", "yes", "on", "y")  # as Triton reads its own variables


def is_switched_on(variable: str) -> bool:
    """Whether an environment variable has one of the values that mean on. All others mean off."""
    return os.environ.get(variable, "").lower() in _ON


_log = logging.getLogger("cogview_kernels")
if is_switched_on("COGVIEW_KERNELS_TRACE"):
    _log.setLevel(logging.DEBUG)
    _log.addHandler(logging.StreamHandler())

# Read once: asking the environment at every call costs as much as choosing.
TRITON_INTERPRETED = is_switched_on("TRITON_INTERPRET")
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Plain PyTorch, which runs wherever PyTorch does.
_PLAIN = ("sdpa", "chunked", "reference")


def _tell(message: str, *arguments: object) -> None:
    # A call to a logger would break the graph of torch.compile.
    if not torch.compiler.is_compiling():
        _log.debug(message, *arguments)


def why_not(backend: str, device: torch.device) -> str:
    """The reason why ``backend`` cannot serve tensors on ``device``; empty when it can."""
    if backend in _PLAIN:
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
        if _device.capability(device) < (8, 0):
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
        return (*(("triton", "cuda") if _device.capability(device) >= (8, 0) else ("cuda",)), *_PLAIN)
    return ("cpu", *_PLAIN) if device.type == "cpu" else _PLAIN


_signature = getattr(_extension.native, "signature", None)
_DIRECT, _RECORDED = b"dr"  # kDirect and kRecorded in csrc/python_tensor.h

# A plain dictionary: torch.compile traces it without the warning that functools.cache draws.
_candidates: dict[tuple[str, torch.device], tuple[str, ...]] = {}


def _candidates_for(op: str, supported: tuple[str, ...], device: torch.device) -> tuple[str, ...]:
    """The backends of ``op`` that serve ``device``, best first."""
    found = _candidates.get((op, device))
    if found is None:
        reasons = {
            name: why_not(name, device) if name in supported else "not written for this op"
            for name in _preference(device)
        }
        found = tuple(name for name, reason in reasons.items() if not reason)
        _candidates[op, device] = found
        against = "".join(f"\n  not {name}: {reason}" for name, reason in reasons.items() if reason)
        _tell("%s on %s: %s%s", op, device, found[0], against)
    return found


_MOST_KEPT = 1024


# The backends of calls that passed every check, by signature.
_passed: dict[bytes | None, str] = {}


def signature(op: str, *arguments: object) -> bytes | None:
    """What the checks of ``op`` and the choice of its backend depend on, or None where that cannot be told.

    Two calls have the same signature only if their arguments are equal, or tensors of one device, dtype,
    shape and strides, and if a gradient is wanted in both or in neither. So a call that looks like one that
    passed, see :func:`passed`, needs no check: together they cost more host time than the rest of a call.
    """
    if _signature is None or torch.compiler.is_compiling():
        return None
    return _signature(torch.is_grad_enabled(), op, *arguments)


def is_direct(signature: bytes | None) -> bool:
    """Whether a kernel of the CPU can take the arguments as they are, and no gradient is wanted of them."""
    return signature is not None and signature[0] == _DIRECT


def is_recorded(signature: bytes | None) -> bool:
    """Whether one of the arguments requires a gradient, and operations are recorded."""
    return signature is not None and signature[0] == _RECORDED


def passed(signature: bytes | None) -> str | None:
    """The backend of an earlier call of this signature that passed; None where there was none."""
    return _passed.get(signature)


def remember(signature: bytes | None, backend: str) -> str:
    """Calls of this signature pass with ``backend`` from now on. Gives ``backend``."""
    return keep(_passed, signature, backend)


def keep(memory: dict[bytes | None, T], signature: bytes | None, found: T) -> T:
    """Gives ``found``, and lets ``memory`` keep it for calls of this signature."""
    if signature is not None:
        if len(memory) >= _MOST_KEPT:
            memory.clear()
        memory[signature] = found
    return found


def choose(
    op: str,
    supported: tuple[str, ...],
    backend: str | None,
    device: torch.device,
    limit: Callable[..., str],
    *arguments: Any,
) -> str:
    """The backend that runs ``op``.

    Args:
        supported: the backends written for ``op``; the last one takes everything that the op does.
        backend: the one asked for, or None for the best that serves ``device`` and ``arguments``.
        limit: ``limit(name, *arguments)`` says why backend ``name`` cannot take them; empty when it can.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        NotImplementedError: it is, but not written for this op, or not for these arguments.
        RuntimeError: it cannot run here; the message says why and the way out.
    """
    if backend is None:
        for name in _candidates_for(op, supported, device):
            reason = limit(name, *arguments)
            if not reason:
                return name
            _tell("%s: not %s: %s", op, name, reason)
        raise NotImplementedError(f"{op}: {reason}")
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend not in supported:
        raise NotImplementedError(f"{op}: no {backend} backend; this op has {', '.join(supported)}")
    if reason := why_not(backend, device):
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
    if reason := limit(backend, *arguments):
        raise NotImplementedError(f"{op}: {reason}")
    _tell("%s on %s: %s, as asked", op, device, backend)
    return backend
