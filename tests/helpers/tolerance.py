# SPDX-License-Identifier: Apache-2.0
"""The one error budget: a kernel may err as eager PyTorch does in the same dtype, times a factor.

Errors are measured against float64. The factor on the root mean square is 2 for outputs and 3 for gradients,
and on the largest element twice that, because a largest element is a matter of chance.

Eager PyTorch's own error is a matter of chance as well: over a dozen elements one order of summation may be
exact where another is not, and a softmax over one key is. So ``judge`` runs the reference several times,

- in the dtype, with every sum taken in an order of its own;
- in float64 with every intermediate result rounded as in the dtype, on a grid that is scaled at random, so
  that a number which the dtype happens to hold exactly is rounded too. This is the floor: what the roundings
  of the intermediate results and of the result itself cost, however lucky eager arithmetic is;

and the budget begins from the largest error of all those runs. The fewer numbers a test compares, the more
runs it takes for chance to even out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.helpers.rounding import RoundedIntermediates, SumsInAnotherOrder

OUTPUT, GRADIENT = 2.0, 3.0

Results = Sequence[Tensor | None]

# Of each kind of run, for as few numbers as a test compares.
_MOST_RUNS, _FEWEST_RUNS, _NUMBERS = 8, 1, 2**14

# error / allowed of every check since a test began; tests/conftest.py clears and reads it.
shares: list[float] = []


def judge(
    reference: Callable[..., Results],
    inputs: Sequence[Tensor | None],
    *,
    compute: torch.dtype | None = None,
) -> tuple[list[Tensor | None], list[list[Tensor] | None]]:
    """``(truth, eager)``: for each result of ``reference(*inputs)`` a tensor in float64, and a list of them.

    ``reference`` computes in the dtype of the tensors that it is given. ``compute`` is the dtype in which a
    kernel has to compute where that is not the inputs'; results are then rounded to the first input's dtype.
    """
    dtype = next(x.dtype for x in inputs if x is not None)
    truth = list(reference(*_cast(inputs, torch.float64)))
    given = _cast(inputs, compute) if compute else inputs
    compute = compute or dtype
    numbers = min((t.numel() for t in truth if t is not None), default=0)
    runs = max(_FEWEST_RUNS, min(_MOST_RUNS, _NUMBERS // max(numbers, 1)))
    variants = []
    for seed in range(runs):
        with SumsInAnotherOrder(seed):
            variants.append(reference(*given))
    if compute != dtype:
        variants = [[None if x is None else x.to(dtype) for x in results] for results in variants]
    for seed in range(runs):
        with RoundedIntermediates(seed, compute) as rounded:
            results = reference(*_cast(inputs, torch.float64))
        if compute != dtype:
            results = [None if x is None else rounded.round(x, dtype) for x in results]
        variants.append(results)
    eager = [
        None if results[0] is None else [x.detach().double() for x in results]
        for results in zip(*variants, strict=True)
    ]
    return truth, eager


def assert_within_budget(
    actual: Tensor,
    eager: Sequence[Tensor],
    truth: Tensor,
    *,
    dtype: torch.dtype,
    factor: float = OUTPUT,
    name: str = "output",
) -> None:
    """``actual`` from the kernel, in ``dtype``; ``eager`` and ``truth`` from ``judge``."""
    assert truth.dtype == torch.float64, "the truth is computed in float64"
    assert actual.dtype == dtype, f"{name}: dtype {actual.dtype}, expected {dtype}"
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    actual, truth = actual.detach().double(), truth.detach()
    assert bool(torch.isfinite(actual).all()), f"{name}: NaN or Inf"
    for measure, norm, times in (("rms", _rms, factor), ("largest", _largest, 2 * factor)):
        error, eager_error = norm(actual - truth), max(norm(x - truth) for x in eager)
        allowed = times * eager_error
        shares.append(error / allowed if allowed else float(error > 0))
        assert error <= allowed, (
            f"{name}: {measure} error {error:.3e} in {dtype}, allowed {allowed:.3e} "
            f"= {times} x {eager_error:.3e}, the largest of {len(eager)} runs of eager PyTorch"
        )


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def _largest(error: Tensor) -> float:
    return float(error.abs().max())


def _cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else x.detach().to(dtype) if x.is_floating_point() else x for x in tensors]
