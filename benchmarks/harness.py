# SPDX-License-Identifier: Apache-2.0
"""One op's benchmark: cases, variants that race on the same tensors, and the rows that come out.

A bench file names a ``Benchmark``. Per case (shape, dtype, direction) the harness makes the inputs, checks
every variant against the reference, then times those that are right in turns (``benchmarks.timing``).
"""

from __future__ import annotations

import functools
import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.timing import Job, Limits
from cogview_kernels import _backends

FORWARD, BACKWARD, BOTH = "fwd", "bwd", "fwd+bwd"

# Largest relative error (of norms) at which a variant still computes the same function. Gradients get three
# times as much. float32 allows for sums in another order over long rows.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    shape: Any
    dtype: torch.dtype
    direction: str

    def __str__(self) -> str:
        return f"{self.shape.name}-{str(self.dtype).removeprefix('torch.')}-{self.direction}"


@dataclass(frozen=True)
class Work:
    """What a variant must do: ``amount`` floating-point operations ("matmul") or bytes ("copy")."""

    amount: float
    bound: str
    formula: str


@dataclass
class Inputs:
    """Tensors and numbers by name. ``leaves`` are differentiated; ``results`` match ``douts`` in order."""

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

    def gradients_of(self) -> tuple[Tensor, ...]:
        return tuple(self.values[name] for name in self.leaves)


Forward = Callable[[], Any]


@dataclass(frozen=True)
class Variant:
    """``prepare(inputs, case)`` does what a user does once (building masks, compiling) and gives the forward.

    ``why_not(case, device)`` is the reason why it cannot run there, or "". ``truth`` names what it is checked
    against where that is not the op itself (dense attention computes something else); ``work`` likewise.
    Kinds: "backend" is ours, "rival" is not, "bound" is work that no variant can do without: it is not
    checked, and its forward is timed whatever the direction.
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
    """``truths[name](inputs, case)`` gives the forward of a reference in float32, on the part of the inputs
    that ``part`` keeps; ``part(results)`` takes the matching part of a variant's results."""

    op: str
    cases: Callable[[torch.device, bool], list[Case]]
    inputs: Callable[[Case, torch.device], Inputs]
    truths: dict[str, Callable[[Inputs, Case], tuple[Inputs, Forward]]]
    variants: tuple[Variant, ...]
    work: Callable[[Case, Inputs], Work]
    baseline: str
    part: Callable[[tuple[Tensor, ...], Case], tuple[Tensor, ...]] = lambda results, case: results
    limits: Callable[[Case, torch.device], Limits] = field(
        default=lambda case, device: Limits(1.0, 10, 200) if device.type == "cuda" else Limits(2.0, 5, 40)
    )


def backends(
    op: str, call: Callable[[Callable[..., Any], Inputs], Any], names: tuple[str, ...] | None = None
) -> tuple[Variant, ...]:
    """A variant per backend written for ``op``; ``call(function, inputs)`` calls it. ``names`` where the op
    has no one list of them."""
    function = getattr(importlib.import_module("cogview_kernels"), op)
    names = names or importlib.import_module(f"cogview_kernels.{op}.api")._SUPPORTED

    def variant(name: str) -> Variant:
        chosen = functools.partial(function, backend=name)
        return Variant(
            name,
            lambda inputs, case: lambda: call(chosen, inputs),
            kind="backend",
            why_not=lambda case, device: _backends.why_not(name, device),
        )

    return tuple(variant(name) for name in names if name != "reference")


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def job(forward: Forward, inputs: Inputs, direction: str) -> Job:
    """The repetition that is timed: gradients are returned, not accumulated; no graph is kept."""

    def gradients(outputs: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(_tuple(outputs), inputs.gradients_of(), inputs.douts)

    def no_grad(_: Any) -> Any:
        with torch.no_grad():
            return forward()

    if direction == FORWARD:
        return Job(no_grad)
    if direction == BACKWARD:
        return Job(gradients, setup=forward)
    return Job(lambda _: gradients(forward()))


def relative_error(actual: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest over the results of ``|actual - truth| / |truth|``; NaN counts as infinite."""
    assert len(actual) == len(truth), f"{len(actual)} results, the reference has {len(truth)}"
    worst = 0.0
    for a, t in zip(actual, truth, strict=True):
        assert a.shape == t.shape, f"shape {tuple(a.shape)}, the reference has {tuple(t.shape)}"
        a, t = a.detach().double(), t.detach().double()
        error = float((a - t).norm() / t.norm().clamp_min(1e-300))
        worst = max(worst, error if error == error else float("inf"))
    return worst


@dataclass
class Outcome:
    """Of one case. ``skipped`` and ``wrong`` give a reason per variant that was not timed."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    times_ms: dict[str, list[float]] = field(default_factory=dict)


def race(
    bench: Benchmark,
    cases: list[Case],
    device: torch.device,
    ceilings: dict[str, Any],
    *,
    variants: tuple[Variant, ...],
    limits: Limits | None = None,
) -> dict[Case, Outcome]:
    """Checks and times ``variants`` on cases that differ in direction alone, on one set of inputs."""
    # Dynamo gives up on a function, silently, after a few shapes; each race starts afresh.
    torch.compiler.reset()
    torch.manual_seed(0)
    inputs = bench.inputs(cases[0], device)
    forwards: dict[str, Forward] = {}
    outcomes: dict[Case, Outcome] = {}
    for case in cases:
        outcomes[case] = outcome = Outcome()
        for tensor in inputs.gradients_of():
            tensor.requires_grad_(case.direction != FORWARD)
        jobs = _checked_jobs(bench, case, device, inputs, variants, forwards, outcome)
        gc.collect()
        if not jobs:
            continue
        outcome.times_ms = timing.interleave(jobs, device, limits or bench.limits(case, device))
        for variant in variants:
            if variant.name in jobs:
                spread = timing.spread(outcome.times_ms[variant.name])
                row = _row(bench, variant, case, inputs, device, jobs[variant.name], spread, ceilings)
                error = outcome.errors.get(variant.name)
                outcome.rows.append({**row, "relative_error": None if error is None else _digits(error)})
    return outcomes


def _checked_jobs(
    bench: Benchmark,
    case: Case,
    device: torch.device,
    inputs: Inputs,
    variants: tuple[Variant, ...],
    forwards: dict[str, Forward],
    outcome: Outcome,
) -> dict[str, Job]:
    """The variants that can run and are right. ``forwards`` keeps what was prepared for the next call."""
    truths: dict[str, tuple[Tensor, ...]] = {}
    jobs: dict[str, Job] = {}
    allowed = TOLERANCE[case.dtype] * (1 if case.direction == FORWARD else 3)
    for variant in variants:
        # A rival may fail; a backend of ours that fails or errs turns the run red.
        refused = outcome.skipped if variant.kind == "rival" else outcome.wrong
        if reason := variant.why_not(case, device):
            outcome.skipped[variant.name] = reason
            continue
        if variant.kind == "bound":
            forward = variant.prepare(inputs, case)
            jobs[variant.name] = Job(lambda _, forward=forward: forward())
            continue
        if variant.truth not in truths:
            part, forward = bench.truths[variant.truth](inputs, case)
            direction = FORWARD if case.direction == FORWARD else BOTH
            truths[variant.truth] = tuple(x.detach() for x in _tuple(job(forward, part, direction)()))
        try:
            if variant.name not in forwards:
                forwards[variant.name] = variant.prepare(inputs, case)
            candidate = job(forwards[variant.name], inputs, case.direction)
            results = bench.part(_tuple(candidate()), case)
        except Exception as failure:  # whatever a rival raises is its own reason to be left out
            refused[variant.name] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            continue
        error = outcome.errors[variant.name] = relative_error(results, truths[variant.truth])
        del results
        if error > allowed:
            refused[variant.name] = f"wrong by {error:.1e}, allowed {allowed:.1e}"
            continue
        jobs[variant.name] = candidate
    return jobs


def _row(
    bench: Benchmark,
    variant: Variant,
    case: Case,
    inputs: Inputs,
    device: torch.device,
    candidate: Job,
    spread: timing.Spread,
    ceilings: dict[str, Any],
) -> dict[str, Any]:
    work = (variant.work or bench.work)(case, inputs)
    rate = work.amount / spread.median / (1e9 if work.bound == "matmul" else 1e6)
    if work.bound == "matmul":
        ceiling = ceilings["matmul_tflop_s"][str(case.dtype).removeprefix("torch.")]
    else:
        ceiling = ceilings["copy_gb_s"]
    row: dict[str, Any] = {
        "shape": case.shape.name,
        "sizes": str(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": case.direction,
        "variant": variant.name,
        "kind": variant.kind,
        "note": variant.note,
        "ms": _digits(spread.median),
        "ms_quartiles": [_digits(spread.low), _digits(spread.high)],
        "rounds": spread.rounds,
        "rate": _digits(rate),
        "rate_unit": "TFLOP/s" if work.bound == "matmul" else "GB/s",
        "formula": work.formula,
        "share_of_ceiling": _digits(rate / ceiling),
        "peak_bytes": timing.peak_bytes(candidate, device),
        "result_bytes": sum(x.numel() * x.element_size() for x in _tuple(candidate())),
    }
    if device.type == "cuda":
        row["host_us"] = _digits(timing.host_us(candidate, device))
        if spread.median < 0.05 and case.direction == FORWARD:
            try:
                row["graph_ms"] = _digits(timing.graph_ms(candidate))
            except RuntimeError as failure:
                row["graph_ms"] = None
                row["graph_reason"] = " ".join(str(failure).split())[:200]
    return row


def _digits(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")
