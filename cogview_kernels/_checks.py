# SPDX-License-Identifier: Apache-2.0
"""Argument checks. Each error names the argument, what was expected, what came, and the way out."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Whose memory holds their values; other subclasses may compute them.
PLAIN = (Tensor, torch.nn.Parameter)

# A tracer keeps sizes, and numbers that follow from them, as symbols.
_INTS = (int, torch.SymInt)
_NUMBERS = (*_INTS, float, torch.SymFloat)

# PyTorch raises when asked for autocast on other devices, such as meta. Asked here, once: torch.compile of
# PyTorch 2.11 cannot trace the question.
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", torch._C._get_privateuse1_backend_name())
_AUTOCAST = frozenset(name for name in _DEVICES if torch.amp.is_autocast_available(name))


def check_float(op: str, name: str, x: Tensor) -> None:
    """``x`` has a dtype that a backend takes: kernels take all but float64, plain PyTorch takes that too."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS and x.dtype != torch.float64:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    check_dense(op, name, x)


def check_dense(op: str, name: str, x: Tensor) -> None:
    """``x`` has strides, which kernels and references read."""
    if x.is_nested:
        raise TypeError(f"{op}: {name} must be dense, got a nested tensor; pad it with to_padded_tensor")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be dense, got {x.layout}; try to_dense()")


def check_tensors(op: str, *, or_none: bool = False, **tensors: object) -> None:
    """Each argument, by its name, is a tensor, or ``or_none``."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and not (or_none and x is None):
            kind = "a tensor or None" if or_none else "a tensor"
            raise TypeError(f"{op}: {name} must be {kind}, got {type(x).__name__}")
        if isinstance(x, Tensor):
            check_dense(op, name, x)


def check_same_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other_name}, {other.device}, got {x.device}"
        )


def check_finite_number(op: str, name: str, value: float, *, positive: bool = False) -> None:
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    # Not math.isfinite, which cannot be traced: a number that changes is a symbol to torch.compile.
    if not -math.inf < value < math.inf or (positive and value <= 0):
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
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor or None, got {type(x).__name__}")
    check_dense(op, name, x)
    if x.dim() != 1 or x.shape[0] != other.shape[-1]:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(other.shape[-1:])}, the last dimension of {other_name}, "
            f"got {tuple(x.shape)}"
        )
    if x.dtype not in (other.dtype, torch.float32):
        wide = "" if other.dtype == torch.float32 else ", or torch.float32"
        raise TypeError(f"{op}: {name} must be {other.dtype}, as {other_name} is{wide}, got {x.dtype}")
    check_same_device(op, name, x, other_name, other)


def check_choice(op: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_bool(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        kind = type(value)
        # numpy's calls itself bool as well.
        got = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise TypeError(f"{op}: {name} must be a bool, True or False, got {got}")


def check_rms_options(
    op: str, eps: float, weight_offset: float, round_before_weight: bool, pb_relax: str | None
) -> None:
    """What :func:`cogview_kernels.rms_norm` says of these."""
    check_finite_number(op, "eps", eps, positive=True)
    check_finite_number(op, "weight_offset", weight_offset)
    check_bool(op, "round_before_weight", round_before_weight)
    check_choice(op, "pb_relax", pb_relax, (None, "row", "tensor"))


def check_probability(op: str, name: str, p: float) -> None:
    """``p`` is a probability of dropout, in [0, 1)."""
    check_finite_number(op, name, p)
    if not 0 <= p < 1:
        raise ValueError(f"{op}: {name} must be in [0, 1), got {p}")


def check_dropout(op: str, p: float, seed: int | Tensor | None, other_name: str, other: Tensor) -> None:
    """``p`` is in [0, 1), ``seed`` an int or a 0-d int64 tensor, on the CPU or beside ``other``."""
    if p == 0 and seed is None:  # the usual call
        return
    check_probability(op, "dropout_p", p)
    if seed is None:
        return
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            got = f"{seed.dtype} {tuple(seed.shape)}"
            raise TypeError(f"{op}: seed must be an int or a 0-d int64 tensor, got {got}")
        if seed.device.type != "cpu":
            check_same_device(op, "seed", seed, other_name, other)
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: seed must be an int or a 0-d int64 tensor, got {type(seed).__name__}")
    elif not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed must have at most 64 bits, got {seed}")


def check_positions(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """``x`` is an integer for each sample of ``other``, beside it."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} must be an int32 or int64 tensor, got {got}")
    if x.shape != other.shape[:1]:
        raise ValueError(f"{op}: {name} must have shape [{other.shape[0]}], got {tuple(x.shape)}")
    check_same_device(op, name, x, other_name, other)


def check_starts(op: str, starts: Tensor | None, q: Tensor) -> None:
    """``starts`` is None, or an integer for each sample of ``q``, beside it."""
    if starts is not None:
        check_positions(op, "starts", starts, "q", q)


def check_int(op: str, name: str, value: object) -> None:
    if not isinstance(value, _INTS) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")


def check_count(op: str, name: str, value: int, least: int) -> None:
    check_int(op, name, value)
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def checked_pair(
    op: str, name: str, value: Any, sides: tuple[str, str], least: int, *, or_none: bool = False
) -> tuple[int, int]:
    """``value``, which is a pair of ints, called ``sides``, of at least ``least``. That the caller also takes
    None is only said."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        kind = f"a pair of ints ({', '.join(sides)})" + (" or None" if or_none else "")
        raise TypeError(f"{op}: {name} must be {kind}, got {value!r}")
    for side, one in zip(sides, value, strict=True):
        check_count(op, f"the {side} of {name}", one, least)
    return value[0], value[1]


def kernel_dtype_limit(backend: str, name: str, x: Tensor) -> str:
    """Why the kernels of ``backend`` cannot take the dtype of ``x``; empty when they can."""
    if x.dtype in FLOATS:
        return ""
    return f"the {backend} backend takes {name} in float32, float16 or bfloat16, got {x.dtype}"


def triton_rows_limit(name: str, x: Tensor) -> str:
    """Why Triton kernels, which number rows in 32 bits, cannot take ``x``; empty when they can."""
    rows = x.numel() // max(1, x.shape[-1])
    if rows < 2**31:
        return ""
    return f"the triton backend takes {name} of fewer than 2^31 rows, got {rows}; split the batch"


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for ``device``."""
    if not torch._C._is_any_autocast_enabled():  # the usual case, at a tenth of the price
        return False
    return device.type in _AUTOCAST and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """For the references, whose products are in the dtype that they are given."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else contextlib.nullcontext()


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as autocast gives them to a matrix product: floats but float64 in its dtype."""
    return tuple(
        x.to(torch.get_autocast_dtype(x.device.type))
        if isinstance(x, Tensor)
        and x.dtype.is_floating_point
        and x.dtype != torch.float64
        and is_autocast(x.device)
        else x
        for x in tensors
    )


def autocast_parameters(activations: Sequence[Any], parameters: Sequence[Any]) -> tuple[Any, ...]:
    """A norm's parameters, those of another dtype than that of the activations in float32."""
    if not all(isinstance(x, Tensor) and is_autocast(x.device) for x in activations):
        return tuple(parameters)
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in activations))
    return tuple(
        p.to(torch.promote_types(dtype, torch.float32))
        if isinstance(p, Tensor) and p.dtype.is_floating_point and p.dtype != dtype
        else p
        for p in parameters
    )
