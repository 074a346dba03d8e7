# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks
from cogview_kernels.sandwich_rms_norm.reference import sandwich_rms_norm_reference

_OP = "sandwich_rms_norm"
_BACKENDS = ("reference",)


def _limit(backend: str, branch: Tensor) -> str:
    return ""


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The end of one branch of a sandwich norm and the start of the next, in one pass over memory.

    Equals, with :func:`cogview_kernels.rms_norm` (see there for the options that both norms share)::

        residual_out = residual + rms_norm(F.dropout(branch, dropout_p), post_weight)
        normed = None if pre_weight is None else rms_norm(residual_out, pre_weight)

    So do Gemma 2 and 3 (``weight_offset=1``), GLM-4 and GLM-Image (``round_before_weight=True``), and, with
    ``pre_weight=None``, OLMo 2, which has no norm before a branch.

    Args:
        branch, residual: ``[..., C]``, of one shape; float32, float16 or bfloat16 (float64 by the
            reference). A 16-bit branch on a float32 residual, as under autocast, is read as it is; other
            dtypes that differ are promoted.
        post_weight: ``[C]`` or None, for the norm on the branch; the dtype of ``branch`` or float32.
        pre_weight: the same for the norm that the next branch starts with; None leaves that norm out.
        eps: positive.
        weight_offset: what is added to both weights.
        round_before_weight: whether a normalised row is rounded to the dtype of ``branch`` (in the second
            norm to that of ``residual_out``) before it is multiplied by the weight.
        pb_relax: None, "row" or "tensor".
        dropout_p: probability of dropping an element of ``branch``, in [0, 1).
        seed: of the dropout mask: an integer, a 0-d int64 tensor, or None for one drawn from PyTorch's
            default generator. Every backend draws the same mask from one seed.
        backend: "triton", "cuda", "cpu" or "reference"; None takes the best for the device.

    Returns:
        ``(residual_out, normed)`` of the shape of ``branch`` and of the promoted dtype; ``normed`` is None
        without ``pre_weight``. Statistics are in float32. ``residual_out`` is rounded once, where the models
        round the norm and then the sum (so does the reference); ``normed`` is taken from it as rounded.

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape or range above is not met, or devices differ.
        NotImplementedError: the named backend does not take float64 or, holding a row in registers ("triton",
            "cuda"), a C above 4,096.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: Gemma 2, arXiv:2408.00118, section 2; CogView, arXiv:2105.13290, section 2.4.
    """
    _checks.check_float(_OP, "branch", branch)
    _checks.check_float(_OP, "residual", residual)
    _checks.check_rows(_OP, "branch", branch)
    if branch.shape != residual.shape:
        raise ValueError(
            f"{_OP}: residual must have the shape of branch, {tuple(branch.shape)}, "
            f"got {tuple(residual.shape)}"
        )
    _checks.check_same_device(_OP, "residual", residual, "branch", branch)
    if branch.dtype != residual.dtype:
        residual = residual.to(torch.promote_types(branch.dtype, residual.dtype))
        if residual.dtype != torch.float32:
            branch = branch.to(residual.dtype)
    _checks.check_norm_parameter(_OP, "post_weight", post_weight, "branch", branch)
    _checks.check_norm_parameter(_OP, "pre_weight", pre_weight, "branch", branch)
    _checks.check_finite_number(_OP, "eps", eps, positive=True)
    _checks.check_finite_number(_OP, "weight_offset", weight_offset)
    _checks.check_choice(_OP, "round_before_weight", round_before_weight, (False, True))
    _checks.check_choice(_OP, "pb_relax", pb_relax, (None, "row", "tensor"))
    _checks.check_dropout(_OP, dropout_p, seed, "branch", branch)
    _backends.choose(_OP, _BACKENDS, backend, branch.device, _limit, branch)
    return sandwich_rms_norm_reference(
        branch,
        residual,
        post_weight,
        pre_weight,
        eps=eps,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        pb_relax=pb_relax,
        dropout_p=dropout_p,
        seed=seed,
    )
