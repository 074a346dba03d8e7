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
