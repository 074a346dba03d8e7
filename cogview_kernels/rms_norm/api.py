# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks, _sharding
from cogview_kernels.rms_norm.op import backend_module, rms_norm_op
from cogview_kernels.rms_norm.reference import rms_norm_reference

_OP = "rms_norm"
_BACKENDS = ("triton", "cuda", "cpu", "reference")


def _limit(backend: str, x: Tensor) -> str:
    return "" if backend == "reference" else backend_module(backend).limit(backend, x)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    pb_relax: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """RMSNorm over the last dimension, as Llama, OLMo, Gemma and GLM have it.

    Equals, with ``y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)``,

    - ``(y * (weight_offset + weight.float())).to(x.dtype)``: Gemma with ``weight_offset=1``, OLMo with 0;
    - ``(y.to(x.dtype) * (weight_offset + weight.float())).to(x.dtype)`` with ``round_before_weight=True``:
      Llama and GLM. To the gradient the first rounding is the identity.

    ``pb_relax`` divides ``x`` by an eighth of an absolute maximum beforehand, so that squares of large
    activations do not overflow. In exact arithmetic that only turns ``eps`` into ``eps * (abs_max / 8)^2``:

    - ``None``: 8, that is plain RMSNorm, the default;
    - ``"row"``: ``x.abs().amax(-1, keepdim=True)``, a constant to the gradient;
    - ``"tensor"``: ``x.abs().amax()``, likewise.

    Args:
        x: ``[..., C]``; float32, float16 or bfloat16 (float64 by the reference). Any strides; rows
            that are not evenly spaced cost a copy.
        weight: ``[C]`` or None, which stands for a factor of 1; the dtype of ``x`` or float32
            (under autocast any).
        eps: positive.
        weight_offset: what is added to ``weight``; without a weight it has no effect.
        round_before_weight: whether the normalised row is rounded to the dtype of ``x`` before it is
            multiplied by the weight. It changes nothing in float32.
        pb_relax: None, "row" or "tensor", as above.
        backend: "triton", "cuda", "cpu" or "reference"; None takes the best for the device.

    Returns:
        The shape and dtype of ``x``, also where ``weight`` is float32. Statistics are in float32.

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape or range above is not met, or devices differ.
        NotImplementedError: the named backend does not take float64 or, holding a row in registers ("triton",
            "cuda"), a C above 4,096; "triton" takes fewer than 2^31 rows.
            A DTensor that is cut along C, or along rows with ``pb_relax="tensor"``.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: Zhang and Sennrich, arXiv:1910.07467; ``pb_relax``: CogView, arXiv:2105.13290, section 2.4.
    """
    options = (eps, weight_offset, round_before_weight, pb_relax)
    signature = _backends.signature(_OP, x, weight, *options, backend)
    run = rms_norm_op.ready(signature)
    if run is not None:
        return run(x, weight)
    chosen = _backends.passed(signature)
    if chosen is None:
        if torch._C._is_any_autocast_enabled():  # what is cast has never passed as it came
            (weight,) = _checks.autocast_parameters((x,), (weight,))
            signature = _backends.signature(_OP, x, weight, *options, backend)
        chosen = _backends.remember(signature, _checked(x, weight, *options, backend))
        if _sharding.is_sharded(x, backend):
            parts = _sharding.Parts.of_rows(_OP, "x", x, pb_relax)
            rows = range(x.dim() - 1)
            y = rms_norm(
                parts.of("x", x, rows),
                parts.of("weight", weight),
                eps=eps,
                weight_offset=weight_offset,
                round_before_weight=round_before_weight,
                pb_relax=pb_relax,
                backend=backend,
            )
            return parts.join(y, rows)
    if chosen == "reference":
        return rms_norm_reference(
            x,
            weight,
            eps=eps,
            weight_offset=weight_offset,
            round_before_weight=round_before_weight,
            pb_relax=pb_relax,
        )
    numbers = float(eps), float(weight_offset), round_before_weight
    if chosen == "cpu":
        rms_norm_op.prepare(signature, x, weight, *numbers, pb_relax)
    return rms_norm_op.for_signature(signature)(x, weight, *numbers, pb_relax, chosen)[0]


def _checked(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    pb_relax: str | None,
    backend: str | None,
) -> str:
    """The backend that takes the call, which passes every check."""
    _checks.check_float(_OP, "x", x)
    _checks.check_rows(_OP, "x", x)
    _checks.check_norm_parameter(_OP, "weight", weight, "x", x)
    _checks.check_rms_options(_OP, eps, weight_offset, round_before_weight, pb_relax)
    return _backends.choose(_OP, _BACKENDS, backend, x.device, _limit, x)
