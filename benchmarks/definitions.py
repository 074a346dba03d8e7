# SPDX-License-Identifier: Apache-2.0
"""What a bench file declares: cases, inputs, references, and the variants that race.

A bench file names one ``Benchmark``. ``benchmarks.harness`` runs it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import cogview_kernels
from benchmarks.timing import Limits
from cogview_kernels import _backends

FORWARD, BACKWARD, BOTH = "fwd", "bwd", "fwd+bwd"
STEP = "step"  # of training: both, and the optimizer; the variant itself does all of it


@dataclass(frozen=True)
class Case:
    shape: Any
    dtype: torch.dtype
    direction: str

    def __str__(self) -> str:
        return f"{self.shape.name}-{dtype_name(self.dtype)}-{self.direction}"


@dataclass(frozen=True)
class Work:
    """What a variant must do: ``amount`` floating-point operations ("matmul") or bytes ("copy")."""

    amount: float
    bound: str
    formula: str


@dataclass
class Inputs:
    """Tensors and numbers by name. ``leaves`` are differentiated; ``douts`` match the results in order."""

    values: dict[str, Any]
    leaves: tuple[str, ...] = ()
    douts: tuple[Tensor, ...] = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    def float_copy(self) -> Inputs:
        """Leaves and gradients in float32, for a reference."""
        wide = {name: self.values[name].detach().float().requires_grad_() for name in self.leaves}
        return Inputs({**self.values, **wide}, self.leaves, tuple(dout.float() for dout in self.douts))

    def differentiated(self) -> tuple[Tensor, ...]:
        return tuple(self.values[name] for name in self.leaves)


Forward = Callable[[], Any]


@dataclass(frozen=True)
class Variant:
    """``prepare(inputs, case)`` does what a user does once (building masks, compiling) and gives the forward.

    ``why_not(case, device)`` is the reason why the variant cannot run there, or "". ``truth`` names the
    reference that the variant is checked against where that is not the op's own (dense attention computes
    something else); ``work`` likewise. Kinds: a "backend" is ours; so is an
    "option", but not as the op runs by default, and it makes no headline; a "rival" is not; and a "bound" is
    work that no variant can do without: it is not checked, and its forward is timed whatever the direction.
    """

    name: str
    prepare: Callable[[Inputs, Case], Forward]
    kind: str = "rival"
    note: str = ""
    why_not: Callable[[Case, torch.device], str] = lambda case, device: ""
    truth: str = "op"
    work: Callable[[Case, Inputs], Work] | None = None


@dataclass(frozen=True)
class Benchmark:
    """What races in which cases.

    ``backends`` names all of the op's but its reference, and ``call(function, inputs)`` calls the op.
    ``truths[name](inputs, case)`` gives the forward of a reference in float32, on the part of the inputs that
    ``part`` keeps; ``part(results, case)`` takes the matching part of a variant's results.
    """

    op: str
    cases: Callable[[torch.device, bool], list[Case]]
    inputs: Callable[[Case, torch.device], Inputs]
    truths: dict[str, Callable[[Inputs, Case], tuple[Inputs, Forward]]]
    backends: tuple[str, ...]
    call: Callable[[Callable[..., Any], Inputs], Any]
    rivals: tuple[Variant, ...]
    work: Callable[[Case, Inputs], Work]
    baseline: str
    part: Callable[[tuple[Tensor, ...], Case], tuple[Tensor, ...]] = lambda results, case: results
    limits: Callable[[Case, torch.device], Limits] = field(
        default=lambda case, device: Limits(1.0, 10, 200) if device.type == "cuda" else Limits(2.0, 5, 40)
    )

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Our backends, then the rivals."""
        return (*map(self.backend, self.backends), *self.rivals)

    def backend(self, name: str) -> Variant:
        function = functools.partial(getattr(cogview_kernels, self.op), backend=name)
        return Variant(
            name,
            lambda inputs, case: lambda: self.call(function, inputs),
            kind="backend",
            why_not=lambda case, device: _backends.why_not(name, device),
        )


def benchmark_of(op: str) -> Benchmark:
    """The benchmark that ``bench_<op>.py`` declares."""
    return importlib.import_module(f"benchmarks.bench_{op}").BENCHMARK


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
