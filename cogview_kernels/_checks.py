# SPDX-License-Identifier: Apache-2.0
"""Argument checks. Each error names the argument, what was expected, what came, and the way out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_float(op: str, name: str, x: Tensor, *, double: bool = False) -> None:
    """``x`` has a dtype that kernels take (with ``double``, float64 too: plain PyTorch backends)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype in FLOATS or (double and x.dtype == torch.float64):
        return
    hint = "; only backend='reference' takes float64" if x.dtype == torch.float64 else ""
    raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16, got {x.dtype}{hint}")


def check_same_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other_name}, {other.device}, got {x.device}"
        )


def check_finite_number(op: str, name: str, value: float, *, positive: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or (positive and value <= 0):
        kind = "a positive finite number" if positive else "a finite number"
        raise ValueError(f"{op}: {name} must be {kind}, got {value}")


def check_broadcasts(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """``x`` expands to the shape of ``other`` without enlarging it."""
    try:
        fits = torch.broadcast_shapes(x.shape, other.shape) == other.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{op}: {name} must broadcast to the shape of {other_name}, {tuple(other.shape)}, "
            f"got {tuple(x.shape)}"
        )


def check_rows(op: str, name: str, x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must be [..., C] with C of at least 1, got shape {tuple(x.shape)}")


def check_norm_parameter(op: str, name: str, x: Tensor | None, other_name: str, other: Tensor) -> None:
    """``x`` is None, or ``[C]`` in the dtype of the activations ``other`` or in float32."""
    if x is None:
        return
    if x.shape != other.shape[-1:]:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(other.shape[-1:])}, the last dimension of {other_name}, "
            f"got {tuple(x.shape)}"
        )
    if x.dtype not in (other.dtype, torch.float32):
        raise TypeError(
            f"{op}: {name} must be {other.dtype}, as {other_name} is, or torch.float32, got {x.dtype}"
        )
    check_same_device(op, name, x, other_name, other)


def check_choice(op: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_dropout(op: str, p: float, seed: int | Tensor | None) -> None:
    check_finite_number(op, "dropout_p", p)
    if not 0 <= p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {p}")
    if isinstance(seed, Tensor) and (seed.dim() != 0 or seed.dtype != torch.int64):
        raise TypeError(
            f"{op}: seed must be an integer or a 0-d int64 tensor, got {seed.dtype} {tuple(seed.shape)}"
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, Tensor))):
        raise TypeError(f"{op}: seed must be an integer or a 0-d int64 tensor, got {type(seed).__name__}")


def has_values(x: Tensor) -> bool:
    """Whether a check may look at the elements of ``x``: not on a GPU, where that would synchronise, nor
    where ``x`` stands for values that are not there, as in ``torch.compile``, FakeTensorMode or vmap."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for ``device``; PyTorch raises for devices that have none, such as meta."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
