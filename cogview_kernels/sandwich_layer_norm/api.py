# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks, _dropout, _sharding
from cogview_kernels._norms.sandwich import checked_rows, promoted
from cogview_kernels.sandwich_layer_norm.op import backend_module, sandwich_layer_norm_op
from cogview_kernels.sandwich_layer_norm.reference import sandwich_layer_norm_reference

_OP = "sandwich_layer_norm"
_BACKENDS = ("triton", "cuda", "cpu", "reference")
_PARAMETERS = ("post_weight", "post_bias", "pre_weight", "pre_bias")


def _limit(backend: str, branch: Tensor) -> str:
    return "" if backend == "reference" else backend_module(backend).limit(backend, branch)


def sandwich_layer_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    pb_relax: str | None = "row",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    normed_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The end of one Sandwich-LayerNorm branch and the start of the next, in one pass over memory.

    ``pre_weight=None`` is a second norm without a weight; in :func:`sandwich_rms_norm` it is no second norm.

    Equals, with :func:`cogview_kernels.layer_norm`::

        residual_out = residual + layer_norm(F.dropout(branch, dropout_p), post_weight, post_bias)
        normed = layer_norm(residual_out, pre_weight, pre_bias)

    both with ``eps`` and ``pb_relax`` (see there for what the three modes mean and where they differ).

    Args:
        branch, residual: ``[..., C]``, of one shape; float32, float16 or bfloat16 (float64 by the
            reference). A 16-bit branch on a float32 residual, as under autocast, is read, and saved for the
            backward pass, as it is; other dtypes that differ are promoted.
        post_weight, post_bias: ``[C]``, or None for ones and zeros, for the LayerNorm on the branch; the
            dtype of ``branch`` or float32 (under autocast any).
        pre_weight, pre_bias: the same for the LayerNorm that the next branch starts with.
        eps: positive.
        pb_relax: "row", "tensor" or None.
        dropout_p: probability of dropping an element of ``branch``, in [0, 1).
        seed: of the dropout mask: an integer, a 0-d int64 tensor, or None for one drawn from PyTorch's
            default generator. Every backend draws the same mask from one seed.
        normed_dtype: of ``normed``; None for that of ``residual_out``. Where that is float32, it may be the
            16-bit dtype of ``branch``: then ``normed``, and its gradient, are rounded as the next product
            would round them under autocast, to the same bits, without passes over memory for these casts.
        backend: "triton", "cuda", "cpu" or "reference"; None takes the best for the device.

    Returns:
        ``(residual_out, normed)`` of the shape of ``branch``: ``residual_out`` of the promoted dtype, and
        ``normed`` of ``normed_dtype``. Statistics are in float32; ``normed`` is taken from ``residual_out``
        as rounded to its dtype.

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape or range above is not met, or devices differ.
        NotImplementedError: the named backend does not take float64 or, holding a row in registers ("triton",
            "cuda"), a C above 4,096; "triton" takes fewer than 2^31 rows.
            A DTensor that is cut along C, or along rows with ``pb_relax="tensor"``; dropout of one.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: CogView, arXiv:2105.13290, section 2.4 (Sandwich LayerNorm, Precision Bottleneck Relaxation).
    """
    parameters = (post_weight, post_bias, pre_weight, pre_bias)
    options = (eps, pb_relax, dropout_p, seed, normed_dtype)
    kinds = (eps, pb_relax, dropout_p, _dropout.for_signature(seed), normed_dtype)
    signature = _backends.signature(_OP, branch, residual, *parameters, *kinds, backend)
    chosen = _backends.passed(signature)
    if chosen is None:
        if torch._C._is_any_autocast_enabled():  # what is cast has never passed as it came
            parameters = _checks.autocast_parameters((branch, residual), parameters)
            signature = _backends.signature(_OP, branch, residual, *parameters, *kinds, backend)
        chosen = _backends.remember(signature, _checked(branch, residual, parameters, options, backend))
        if _sharding.is_sharded(branch, backend):
            parts = _sharding.Parts.of_rows(_OP, "branch", branch, pb_relax, dropout_p)
            rows = range(branch.dim() - 1)
            both = parts.of("branch", branch, rows), parts.of("residual", residual, rows)
            of_rank = map(parts.of, _PARAMETERS, parameters)
            outputs = sandwich_layer_norm(
                *both, *of_rank, eps=eps, pb_relax=pb_relax, normed_dtype=normed_dtype, backend=backend
            )
            return parts.join(outputs, rows)
    branch, residual = promoted(branch, residual)
    if normed_dtype is None:
        normed_dtype = residual.dtype
    if chosen == "reference":
        wide = torch.float64 if branch.dtype == torch.float64 else torch.float32
        residual_out, normed = sandwich_layer_norm_reference(
            branch.to(wide),
            residual.to(wide),
            *parameters,
            eps=eps,
            pb_relax=pb_relax,
            dropout_p=dropout_p,
            seed=seed,
        )
        return residual_out.to(residual.dtype), normed.to(normed_dtype)
    seed = _dropout.as_seed(dropout_p, seed, branch.device)
    return sandwich_layer_norm_op.for_signature(signature)(
        branch, residual, *parameters, normed_dtype, float(eps), pb_relax, float(dropout_p), seed, chosen
    )[:2]


def _checked(
    branch: Tensor,
    residual: Tensor,
    parameters: tuple[Tensor | None, ...],
    options: tuple[float, str | None, float, int | Tensor | None, torch.dtype | None],
    backend: str | None,
) -> str:
    """The backend that takes the call, which passes every check."""
    eps, pb_relax, dropout_p, seed, normed_dtype = options
    branch, residual = checked_rows(_OP, branch, residual, normed_dtype)
    for name, parameter in zip(_PARAMETERS, parameters, strict=True):
        _checks.check_norm_parameter(_OP, name, parameter, "branch", branch)
    _checks.check_finite_number(_OP, "eps", eps, positive=True)
    _checks.check_choice(_OP, "pb_relax", pb_relax, ("row", "tensor", None))
    _checks.check_dropout(_OP, dropout_p, seed, "branch", branch)
    return _backends.choose(_OP, _BACKENDS, backend, branch.device, _limit, branch)
