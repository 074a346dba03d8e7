# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

from torch import Tensor

from cogview_kernels import _backends, _checks
from cogview_kernels.decode_linear.op import backend_module, decode_linear_op
from cogview_kernels.decode_linear.reference import decode_linear_reference

_OP = "decode_linear"
_BACKENDS = ("cpu", "triton", "reference")


def _limit(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    return "" if backend == "reference" else backend_module(backend).limit(backend, x, weight, bias)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer of a decoding step: few rows, whose time is that of reading the weights.

    Equals ``F.linear(x, weight, bias)``, and with ``activation="gelu_tanh"``
    ``F.gelu(F.linear(x, weight, bias), approximate="tanh")``, of which the kernel rounds the result alone. It
    reads each weight once for all rows, from memory. Where no kernel serves, as for more than 16 rows, plain
    PyTorch runs. A kernel gives the same bits twice, and never waits for the device, so that a CUDA graph can
    capture it.

    Args:
        x: ``[..., K]``; float32, float16, bfloat16 or float64, K at least 1.
        weight: ``[O, K]``, dtype and device of ``x``.
        bias: ``[O]`` or None, dtype and device of ``x``.
        activation: None or "gelu_tanh".
        backend: "cpu", "triton" or "reference"; None takes the best for device and arguments.

    Returns:
        ``[..., O]``, the dtype of ``x`` (under autocast, as ``F.linear`` has it).

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape above is not met, or devices differ.
        NotImplementedError: a limit of the backend asked for ("cpu", "triton": no derivative, no float64, 16
            rows; "triton": rows of ``weight`` contiguous). Without ``backend`` "reference" steps in.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    autocast = isinstance(x, Tensor) and _checks.is_autocast(x.device)
    signature = _backends.signature(_OP, x, weight, bias, activation, autocast, backend)
    chosen = _backends.passed(signature)
    if chosen is None:
        _checks.check_tensors(_OP, x=x, weight=weight)
        _checks.check_tensors(_OP, or_none=True, bias=bias)
        _check(x, weight, bias, activation)
        chosen = _backends.choose(_OP, _BACKENDS, backend, x.device, _limit, x, weight, bias)
        _backends.remember(signature, chosen)
    if chosen == "reference":
        return decode_linear_reference(x, weight, bias, activation)
    return decode_linear_op.for_signature(signature)(x, weight, bias, activation, chosen)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    _checks.check_float(_OP, "x", x)
    _checks.check_rows(_OP, "x", x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{_OP}: weight must have shape [O, {x.shape[-1]}] to go with x, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{_OP}: bias must have shape {tuple(weight.shape[:1])} to go with weight, "
            f"got {tuple(bias.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        # Autocast makes their dtypes one.
        if parameter.dtype != x.dtype and not _checks.is_autocast(x.device):
            raise TypeError(f"{_OP}: {name} must have the dtype of x, {x.dtype}, got {parameter.dtype}")
        _checks.check_same_device(_OP, name, parameter, "x", x)
    _checks.check_choice(_OP, "activation", activation, (None, "gelu_tanh"))
