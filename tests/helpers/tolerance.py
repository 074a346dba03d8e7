# SPDX-License-Identifier: Apache-2.0
"""The one error budget.

A kernel may err at most ``factor`` times as much as eager PyTorch does in the same dtype, both measured
against float64: 2 for outputs, 3 for gradients. Two gates, on the largest and on the root-mean-square error.
Eager arithmetic can be exact by luck (a row of one element), so it is never held to less than what rounding
the truth to the dtype costs at most: half a unit in the last place of the largest value.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUT, GRADIENT = 2.0, 3.0


def assert_within_budget(
    actual: Tensor, eager: Tensor, truth: Tensor, *, factor: float = OUTPUT, name: str = "output"
) -> None:
    """``actual`` from the kernel, ``eager`` from the reference in the same dtype, ``truth`` in float64."""
    assert truth.dtype == torch.float64, "the truth is computed in float64"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager PyTorch gives {eager.dtype}"
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    actual_, eager_, truth = (x.detach().double().cpu() for x in (actual, eager, truth))
    assert bool(torch.isfinite(actual_).all()), f"{name}: NaN or Inf"
    ulp = 0.5 * torch.finfo(actual.dtype).eps * truth.abs().max()
    for measure, norm in (("largest", lambda e: e.abs().max()), ("rms", lambda e: e.square().mean().sqrt())):
        error, eager_error = norm(actual_ - truth), norm(eager_ - truth)
        allowed = factor * torch.maximum(eager_error, ulp)
        assert error <= allowed, (
            f"{name}: {measure} error {error:.3e} in {actual.dtype}, allowed {allowed:.3e} "
            f"= {factor} x max(eager {eager_error:.3e}, rounding {ulp:.3e})"
        )
