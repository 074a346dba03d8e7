# SPDX-License-Identifier: Apache-2.0
"""The one error budget: a kernel may err as eager PyTorch does in the same dtype, times a factor.

Errors are measured against float64. The factor on the root mean square is 2 for outputs and 3 for gradients,
and on the largest element twice that, because a largest element is a matter of chance.

Eager PyTorch's own error is a matter of chance as well: over a dozen elements one order of summation may be
exact where another is not, and a softmax over one key is. So ``judge`` runs the reference in rounds, and a
round has two runs,

- one in the dtype, with every sum taken in an order of its own;
- one in float64 with every intermediate result rounded as in the dtype, on a grid that is scaled at random,
  so that a number which the dtype happens to hold exactly is rounded too. This is the floor: what the
  roundings of the intermediate results and of the result itself cost, however lucky eager arithmetic is;

and the budget begins from the largest error of sixteen rounds. One round may be lucky even over many
elements, because the elements of a row share the error of the row's sum: after eight rounds 2 of 47,000 tests
under fifty seeds still asked too much of a kernel. What one round allows, more rounds allow as well. So a
round is run only for a result that the rounds before it do not let pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.helpers.rounding import RoundedIntermediates, SumsInAnotherOrder

OUTPUT, GRADIENT = 2.0, 3.0

Results = Sequence[Tensor | None]

_ROUNDS = 16

# error / allowed of every check since a test began; tests/conftest.py clears and reads it.
shares: list[float] = []


class _Rounds:
    """The errors of eager PyTorch, round after round, of all results of a reference."""

    def __init__(
        self,
        reference: Callable[..., Results],
        inputs: Sequence[Tensor | None],
        compute: torch.dtype | None,
        dtypes: Sequence[torch.dtype | None] | None,
    ) -> None:
        # Copies, because a later round may run after a test has changed its tensors.
        self.inputs = [None if x is None else x.detach().clone() for x in inputs]
        self.dtype = next(x.dtype for x in inputs if x is not None)
        self.compute = compute or self.dtype
        self.reference = reference
        self.truth = list(reference(*_cast(self.inputs, torch.float64)))
        self.dtypes = dtypes or [self.dtype] * len(self.truth)
        self.errors: list[list[tuple[float, float]]] = [[] for _ in self.truth]
        self.done = 0

    def run(self) -> None:
        """One more round."""
        given = self.inputs if self.compute == self.dtype else _cast(self.inputs, self.compute)
        with SumsInAnotherOrder(self.done):
            results = self.reference(*given)
        self._note(results, lambda x, dtype: x.to(dtype))
        with RoundedIntermediates(self.done, self.compute) as rounded:
            results = self.reference(*_cast(self.inputs, torch.float64))
        self._note(results, rounded.round)
        self.done += 1

    def _note(self, results: Results, to_dtype: Callable[[Tensor, torch.dtype], Tensor]) -> None:
        for errors, result, truth, dtype in zip(self.errors, results, self.truth, self.dtypes, strict=True):
            if result is not None and truth is not None:
                if self.compute != self.dtype and dtype is not None:
                    result = to_dtype(result, dtype)
                error = result.detach().double() - truth.detach()
                errors.append((_rms(error), _largest(error)))


class EagerErrors:
    """``(rms, largest)`` of eager PyTorch's error in one result, each the largest of some rounds."""

    def __init__(self, rounds: _Rounds, result: int) -> None:
        self._rounds, self._result = rounds, result

    def after(self, rounds: int) -> tuple[float, float]:
        while self._rounds.done < rounds:
            self._rounds.run()
        rms, largest = zip(*self._rounds.errors[self._result][: 2 * rounds], strict=True)
        return max(rms), max(largest)


def judge(
    reference: Callable[..., Results],
    inputs: Sequence[Tensor | None],
    *,
    compute: torch.dtype | None = None,
    dtypes: Sequence[torch.dtype | None] | None = None,
) -> tuple[list[Tensor | None], list[EagerErrors | None]]:
    """``(truth, eager)``: for each result of ``reference(*inputs)`` a tensor in float64, and eager's errors.

    ``reference`` computes in the dtype of the tensors that it is given, and may be called again when a result
    is compared. ``compute`` is the dtype in which a kernel has to compute where that is not the inputs';
    results are then rounded to their ``dtypes``, by default all to the first input's.
    """
    rounds = _Rounds(reference, inputs, compute, dtypes)
    return rounds.truth, [
        None if truth is None else EagerErrors(rounds, result) for result, truth in enumerate(rounds.truth)
    ]


def assert_within_budget(
    actual: Tensor,
    eager: EagerErrors,
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
    error = actual.detach().double() - truth.detach()
    assert bool(torch.isfinite(actual.detach()).all()), f"{name}: NaN or Inf"
    errors, factors = (_rms(error), _largest(error)), (factor, 2 * factor)
    for rounds in range(1, _ROUNDS + 1):
        allowed = [times * most for times, most in zip(factors, eager.after(rounds), strict=True)]
        if all(mine <= most for mine, most in zip(errors, allowed, strict=True)):
            break
    for measure, mine, most in zip(("rms", "largest"), errors, allowed, strict=True):
        shares.append(mine / most if most else float(mine > 0))
        assert mine <= most, (
            f"{name}: {measure} error {mine:.3e} in {dtype}, allowed {most:.3e} after {rounds} rounds "
            "of eager PyTorch"
        )


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def _largest(error: Tensor) -> float:
    return float(error.abs().max())


def _cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else x.detach().to(dtype) if x.is_floating_point() else x for x in tensors]
