# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks, _sharding
from cogview_kernels.layer_norm.op import backend_module, layer_norm_op
from cogview_kernels.layer_norm.reference import layer_norm_reference

_OP = "layer_norm"
_BACKENDS = ("triton", "cuda", "cpu", "reference")


def _limit(backend: str, x: Tensor) -> str:
    return "" if backend == "reference" else backend_module(backend).limit(backend, x)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    pb_relax: str | None = "row",
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over the last dimension, in the PB-Relax form that survives large activations.

    Equals ``F.layer_norm(x / (abs_max / 8), (C,), weight, bias, eps)``, where ``abs_max`` is

    - ``"row"``: ``x.abs().amax(-1, keepdim=True)``, the default: independent of the rest of the batch;
    - ``"tensor"``: ``x.abs().amax()``, as CogView's released weights were trained (a NaN in one row makes all
      rows NaN in the reference alone);
    - ``None``: 8, that is plain LayerNorm.

    ``abs_max`` is a constant to the gradient. In exact arithmetic the division only turns ``eps`` into
    ``eps * (abs_max / 8)^2``. So the three modes agree wherever a row's variance is far above that, and
    differ where it is not: under ``"tensor"`` a row about 1e-3 of the tensor's maximum is damped, under
    ``None`` a row with a variance near ``eps`` is, under ``"row"`` only rows that are almost constant are.

    Args:
        x: ``[..., C]``; float32, float16 or bfloat16 (float64 by the reference). Any strides; rows
            that are not evenly spaced cost a copy.
        weight, bias: ``[C]`` or None; the dtype of ``x`` or float32 (under autocast any).
        eps: positive.
        pb_relax: "row", "tensor" or None, as above.
        backend: "triton", "cuda", "cpu" or "reference"; None takes the best for the device.

    Returns:
        The shape and dtype of ``x``. Statistics are in float32 and the variance is taken from centred
        values; any finite float16 input gives finite output.

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape or range above is not met, or devices differ.
        NotImplementedError: the named backend does not take float64 or, holding a row in registers ("triton",
            "cuda"), a C above 4,096; "triton" takes fewer than 2^31 rows.
            A DTensor that is cut along C, or along rows with ``pb_relax="tensor"``.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: CogView, arXiv:2105.13290, section 2.4 (Precision Bottleneck Relaxation).
    """
    signature = _backends.signature(_OP, x, weight, bias, eps, pb_relax, backend)
    run = layer_norm_op.ready(signature)
    if run is not None:
        return run(x, weight, bias)
    chosen = _backends.passed(signature)
    if chosen is None:
        if torch._C._is_any_autocast_enabled():  # what is cast has never passed as it came
            weight, bias = _checks.autocast_parameters((x,), (weight, bias))
            signature = _backends.signature(_OP, x, weight, bias, eps, pb_relax, backend)
        chosen = _backends.remember(signature, _checked(x, weight, bias, eps, pb_relax, backend))
        if _sharding.is_sharded(x, backend):
            parts = _sharding.Parts.of_rows(_OP, "x", x, pb_relax)
            rows = range(x.dim() - 1)
            affine = parts.of("weight", weight), parts.of("bias", bias)
            y = layer_norm(parts.of("x", x, rows), *affine, eps=eps, pb_relax=pb_relax, backend=backend)
            return parts.join(y, rows)
    if chosen == "reference":
        wide = x.float() if x.dtype.itemsize == 2 else x
        return layer_norm_reference(wide, weight, bias, eps=eps, pb_relax=pb_relax).to(x.dtype)
    if chosen == "cpu":
        layer_norm_op.prepare(signature, x, weight, bias, float(eps), pb_relax)
    return layer_norm_op.for_signature(signature)(x, weight, bias, float(eps), pb_relax, chosen)[0]


def _checked(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pb_relax: str | None,
    backend: str | None,
) -> str:
    """The backend that takes the call, which passes every check."""
    _checks.check_float(_OP, "x", x)
    _checks.check_rows(_OP, "x", x)
    _checks.check_norm_parameter(_OP, "weight", weight, "x", x)
    _checks.check_norm_parameter(_OP, "bias", bias, "x", x)
    _checks.check_finite_number(_OP, "eps", eps, positive=True)
    _checks.check_choice(_OP, "pb_relax", pb_relax, ("row", "tensor", None))
    return _backends.choose(_OP, _BACKENDS, backend, x.device, _limit, x)
