# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks, _dropout, _sharding
from cogview_kernels._norms.sandwich import checked_rows, promoted
from cogview_kernels.sandwich_rms_norm.op import backend_module, sandwich_rms_norm_op
from cogview_kernels.sandwich_rms_norm.reference import sandwich_rms_norm_reference

_OP = "sandwich_rms_norm"
_BACKENDS = ("triton", "cuda", "cpu", "reference")


def _limit(backend: str, branch: Tensor) -> str:
    return "" if backend == "reference" else backend_module(backend).limit(backend, branch)


def sandwich_rms_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    pre_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    pb_relax: str | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    normed_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The end of one branch of a sandwich norm and the start of the next, in one pass over memory.

    ``pre_weight=None`` is no second norm; in :func:`sandwich_layer_norm` it is one without a weight, which
    here takes a ``pre_weight`` of ones (of ``1 - weight_offset``).

    Equals, with :func:`cogview_kernels.rms_norm` (see there for the options that both norms share)::

        residual_out = residual + rms_norm(F.dropout(branch, dropout_p), post_weight)
        normed = None if pre_weight is None else rms_norm(residual_out, pre_weight)

    So do Gemma 2 and 3 (``weight_offset=1``), GLM-4 and GLM-Image (``round_before_weight=True``), and, with
    ``pre_weight=None``, OLMo 2, which has no norm before a branch.

    Args:
        branch, residual: ``[..., C]``, of one shape; float32, float16 or bfloat16 (float64 by the
            reference). A 16-bit branch on a float32 residual, as under autocast, is read as it is; other
            dtypes that differ are promoted.
        post_weight: ``[C]``, or None for a factor of 1, for the norm on the branch; the dtype of ``branch``
            or float32 (under autocast any).
        pre_weight: the same for the norm that the next branch starts with; None leaves that norm out.
        eps: positive.
        weight_offset: what is added to both weights.
        round_before_weight: whether a normalised row is rounded to the dtype of ``branch`` (in the second
            norm to that of ``residual_out``) before it is multiplied by the weight.
        pb_relax: None, "row" or "tensor".
        dropout_p: probability of dropping an element of ``branch``, in [0, 1).
        seed: of the dropout mask: an integer, a 0-d int64 tensor, or None for one drawn from PyTorch's
            default generator. Every backend draws the same mask from one seed.
        normed_dtype: of ``normed``; None for that of ``residual_out``. Where that is float32, it may be the
            16-bit dtype of ``branch``: then ``normed``, and its gradient, are rounded as the next product
            would round them under autocast, to the same bits, without passes over memory for these casts.
            What ``round_before_weight`` rounds to does not change.
        backend: "triton", "cuda", "cpu" or "reference"; None takes the best for the device.

    Returns:
        ``(residual_out, normed)`` of the shape of ``branch``: ``residual_out`` of the promoted dtype, and
        ``normed`` of ``normed_dtype``, or None without ``pre_weight``. Statistics are in float32.
        ``residual_out`` is rounded once, where the models round the norm and then the sum (so does the
        reference); ``normed`` is taken from it as rounded.

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape or range above is not met, or devices differ.
        NotImplementedError: the named backend does not take float64 or, holding a row in registers ("triton",
            "cuda"), a C above 4,096; "triton" takes fewer than 2^31 rows.
            A DTensor that is cut along C, or along rows with ``pb_relax="tensor"``; dropout of one.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: Gemma 2, arXiv:2408.00118, section 2; CogView, arXiv:2105.13290, section 2.4.
    """
    weights = (post_weight, pre_weight)
    options = (eps, weight_offset, round_before_weight, pb_relax)
    others = (dropout_p, seed, normed_dtype)
    kinds = (*options, dropout_p, _dropout.for_signature(seed), normed_dtype)
    signature = _backends.signature(_OP, branch, residual, *weights, *kinds, backend)
    chosen = _backends.passed(signature)
    if chosen is None:
        if torch._C._is_any_autocast_enabled():  # what is cast has never passed as it came
            weights = _checks.autocast_parameters((branch, residual), weights)
            signature = _backends.signature(_OP, branch, residual, *weights, *kinds, backend)
        given = (branch, residual, weights, options, others, backend)
        chosen = _backends.remember(signature, _checked(*given))
        if _sharding.is_sharded(branch, backend):
            parts = _sharding.Parts.of_rows(_OP, "branch", branch, pb_relax, dropout_p)
            rows = range(branch.dim() - 1)
            outputs = sandwich_rms_norm(
                parts.of("branch", branch, rows),
                parts.of("residual", residual, rows),
                parts.of("post_weight", weights[0]),
                parts.of("pre_weight", weights[1]),
                eps=eps,
                weight_offset=weight_offset,
                round_before_weight=round_before_weight,
                pb_relax=pb_relax,
                normed_dtype=normed_dtype,
                backend=backend,
            )
            return parts.join(outputs, rows)
    branch, residual = promoted(branch, residual)
    if normed_dtype is None:
        normed_dtype = residual.dtype
    if chosen == "reference":
        residual_out, normed = sandwich_rms_norm_reference(
            branch,
            residual,
            *weights,
            eps=eps,
            weight_offset=weight_offset,
            round_before_weight=round_before_weight,
            pb_relax=pb_relax,
            dropout_p=dropout_p,
            seed=seed,
        )
        return residual_out, None if normed is None else normed.to(normed_dtype)
    seed = _dropout.as_seed(dropout_p, seed, branch.device)
    numbers = float(eps), float(weight_offset), round_before_weight
    residual_out, normed, _ = sandwich_rms_norm_op.for_signature(signature)(
        branch, residual, *weights, normed_dtype, *numbers, pb_relax, float(dropout_p), seed, chosen
    )
    return residual_out, None if pre_weight is None else normed


def _checked(
    branch: Tensor,
    residual: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    options: tuple[float, float, bool, str | None],
    others: tuple[float, int | Tensor | None, torch.dtype | None],
    backend: str | None,
) -> str:
    """The backend that takes the call, which passes every check."""
    dropout_p, seed, normed_dtype = others
    branch, residual = checked_rows(_OP, branch, residual, normed_dtype)
    _checks.check_norm_parameter(_OP, "post_weight", weights[0], "branch", branch)
    _checks.check_norm_parameter(_OP, "pre_weight", weights[1], "branch", branch)
    _checks.check_rms_options(_OP, *options)
    _checks.check_dropout(_OP, dropout_p, seed, "branch", branch)
    return _backends.choose(_OP, _BACKENDS, backend, branch.device, _limit, branch)
