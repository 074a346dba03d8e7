# SPDX-License-Identifier: Apache-2.0
"""Rows of a sandwich as its two ops take them: which dtypes may meet, and which one ``normed`` has."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _checks


def promoted(branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one dtype, or a branch of 16 bits beside a residual in float32, which is that of the result."""
    if branch.dtype == residual.dtype:
        return branch, residual
    residual = residual.to(torch.promote_types(branch.dtype, residual.dtype))
    return branch if residual.dtype == torch.float32 else branch.to(residual.dtype), residual


def checked_rows(
    op: str, branch: Tensor, residual: Tensor, normed_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """What :func:`promoted` gives for rows that pass every check of theirs."""
    _checks.check_float(op, "branch", branch)
    _checks.check_float(op, "residual", residual)
    _checks.check_rows(op, "branch", branch)
    if branch.shape != residual.shape:
        raise ValueError(
            f"{op}: residual must have the shape of branch, {tuple(branch.shape)}, "
            f"got {tuple(residual.shape)}"
        )
    _checks.check_same_device(op, "residual", residual, "branch", branch)
    branch, residual = promoted(branch, residual)
    if normed_dtype not in (None, residual.dtype, branch.dtype):
        of_branch = "" if branch.dtype == residual.dtype else f", or {branch.dtype}, that of branch"
        raise TypeError(
            f"{op}: normed_dtype must be None or {residual.dtype}, that of residual_out{of_branch}, "
            f"got {normed_dtype!r}; leave it out and cast normed"
        )
    return branch, residual
