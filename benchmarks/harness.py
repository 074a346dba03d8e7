# SPDX-License-Identifier: Apache-2.0
"""Runs one op's benchmark in this process: checks every variant, then times those that are right in turns.

``measure`` yields the growing results document after each variant, so that whoever saves what it yields
keeps everything that was measured, however the run ends.
"""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, timing
from benchmarks.definitions import (
    BACKWARD,
    BOTH,
    FORWARD,
    STEP,
    Benchmark,
    Case,
    Forward,
    Inputs,
    Variant,
    Work,
    dtype_name,
)
from benchmarks.timing import Job, Limits
from cogview_kernels.bench import TOLERANCE, relative_error

Row = dict[str, Any]
Document = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How a benchmark is run.

    ``tiny``: tiny shapes and one round, to see that everything runs. ``select``: a regular expression that
    is searched for in "<shape>-<dtype>-<direction> <variant>". ``deadline``, on the clock of
    ``time.monotonic``: whatever would begin later is left out. ``red_tests``: why the figures are not to be
    quoted, "" where the op's tests are green.
    """

    tiny: bool = False
    select: str = ""
    deadline: float = math.inf
    red_tests: str = ""

    def wants(self, case: Case, variant: Variant) -> bool:
        return re.search(self.select, f"{case} {variant.name}") is not None

    def late(self) -> bool:
        return time.monotonic() > self.deadline


@dataclass(frozen=True)
class Outcome:
    """What became of one variant in one case: its row, or the reason why it has none.

    ``failed``: a backend of ours raised an error or computed something else, so the run is red. A rival may.
    """

    case: Case
    variant: Variant
    row: Row | None = None
    reason: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Ready:
    """A variant that is right: what is timed, its relative error (None where nothing is compared), and the
    bytes of its results."""

    job: Job
    error: float | None
    result_bytes: int


def measure(bench: Benchmark, device: torch.device, options: Options) -> Iterator[tuple[Document, Outcome]]:
    """Yields the document, one outcome longer each time, and that outcome.

    The document is a results file (see ``benchmarks.results``); "finished" becomes true after the last
    outcome was yielded.
    """
    cases = list(dict.fromkeys(case for case, _ in wanted(bench, device, options)))
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    document: Document = {
        "op": bench.op,
        "baseline": bench.baseline,
        "environment": environment.describe(device),
        "tiny": options.tiny,
        "finished": False,
        "ceilings": timing.ceilings(device, dtypes, tiny=options.tiny),
        "red_tests": options.red_tests,
        "rows": [],
        "skipped": [],
    }
    for together in alike(cases):
        for outcome in Race(bench, device, document["ceilings"], options).run(together):
            if outcome.row is not None:
                document["rows"].append(outcome.row)
            else:
                entry = {"case": str(outcome.case), "variant": outcome.variant.name, "reason": outcome.reason}
                document["skipped"].append(entry)
            yield document, outcome
    document["finished"] = True


def wanted(bench: Benchmark, device: torch.device, options: Options) -> list[tuple[Case, Variant]]:
    pairs = [(case, v) for case in bench.cases(device, options.tiny) for v in bench.variants]
    return [(case, variant) for case, variant in pairs if options.wants(case, variant)]


def alike(cases: list[Case]) -> list[list[Case]]:
    """Cases that differ in direction alone, together: they race on one set of inputs."""
    groups: dict[tuple[Any, torch.dtype], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.shape, case.dtype), []).append(case)
    return list(groups.values())


class Race:
    """Checks and times variants on cases that differ in direction alone."""

    def __init__(
        self, bench: Benchmark, device: torch.device, ceilings: dict[str, Any], options: Options
    ) -> None:
        self.bench, self.device, self.ceilings, self.options = bench, device, ceilings, options
        self.made: Inputs | None = None
        self.forwards: dict[str, Forward] = {}  # what a variant prepared serves every direction

    def run(self, cases: list[Case]) -> Iterator[Outcome]:
        # Dynamo gives up on a function, silently, after a few shapes; each race starts afresh.
        torch.compiler.reset()
        torch.manual_seed(0)
        for case in cases:
            left = {v.name: v for v in self.bench.variants if self.options.wants(case, v)}
            try:
                for outcome in self._one(case, list(left.values())):
                    del left[outcome.variant.name]
                    yield outcome
            except Exception as failure:  # of the inputs, a reference or the timing: the other cases go on
                for variant in left.values():
                    yield _refusal(case, variant, _one_line(failure))
            gc.collect()

    def _one(self, case: Case, variants: list[Variant]) -> Iterator[Outcome]:
        if self.options.late():
            yield from (Outcome(case, variant, reason="out of time") for variant in variants)
            return
        inputs = self._inputs(case)
        for tensor in inputs.differentiated():
            tensor.requires_grad_(case.direction != FORWARD)
        ready: dict[str, Ready] = {}
        truths: dict[str, tuple[Tensor, ...]] = {}
        for variant in variants:
            if self.options.late():
                yield Outcome(case, variant, reason="out of time")
                continue
            if reason := variant.why_not(case, self.device):
                yield Outcome(case, variant, reason=reason)
                continue
            if variant.truth not in truths:
                truths[variant.truth] = self._truth(variant.truth, case, inputs)
            checked = self._checked(case, inputs, variant, truths[variant.truth])
            if isinstance(checked, Outcome):
                yield checked
            else:
                ready[variant.name] = checked
        del truths
        gc.collect()
        if not ready:
            return
        limits = Limits(0.0, 1, 1) if self.options.tiny else self.bench.limits(case, self.device)
        jobs = {name: one.job for name, one in ready.items()}
        times_ms = timing.interleave(jobs, self.device, limits)
        for variant in variants:
            if one := ready.get(variant.name):
                work = (variant.work or self.bench.work)(case, inputs)
                spread = timing.spread(times_ms[variant.name])
                yield Outcome(case, variant, self._row(case, variant, work, one, spread))

    def _inputs(self, case: Case) -> Inputs:
        """The same for every case: they differ in direction alone."""
        if self.made is None:
            self.made = self.bench.inputs(case, self.device)
        return self.made

    def _truth(self, name: str, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
        part, forward = self.bench.truths[name](inputs, case)
        direction = BOTH if case.direction == BACKWARD else case.direction
        return tuple(x.detach() for x in _tuple(job(forward, part, direction)()))

    def _checked(
        self, case: Case, inputs: Inputs, variant: Variant, truth: tuple[Tensor, ...]
    ) -> Ready | Outcome:
        """The variant ready to be timed, or why it is not to be timed."""
        try:
            if variant.kind == "bound":
                forward, error = variant.prepare(inputs, case), None
                candidate = Job(lambda _: forward())
                found = _tuple(candidate())
            else:
                if variant.name not in self.forwards:
                    self.forwards[variant.name] = variant.prepare(inputs, case)
                candidate = job(self.forwards[variant.name], inputs, case.direction)
                found = _tuple(candidate())
                error = relative_error(self.bench.part(found, case), truth)
        except Exception as failure:  # whatever a rival raises is its own reason to be left out
            return _refusal(case, variant, _one_line(failure), limit=isinstance(failure, NotImplementedError))
        allowed = TOLERANCE[case.dtype] * (1 if case.direction == FORWARD else 3)
        if error is not None and error > allowed:
            return _refusal(case, variant, f"wrong by {error:.1e}, allowed {allowed:.1e}")
        return Ready(candidate, error, sum(x.numel() * x.element_size() for x in found))

    def _row(self, case: Case, variant: Variant, work: Work, ready: Ready, spread: timing.Spread) -> Row:
        matmul = work.bound == "matmul"
        rate = work.amount / spread.median / (1e9 if matmul else 1e6)
        ceiling = _product_ceiling(self.ceilings, case) if matmul else self.ceilings["copy_gb_s"]
        row: Row = {
            "shape": case.shape.name,
            "sizes": str(case.shape),
            "dtype": dtype_name(case.dtype),
            "direction": case.direction,
            "variant": variant.name,
            "kind": variant.kind,
            "note": variant.note,
            "ms": _digits(spread.median),
            "ms_quartiles": [_digits(spread.low), _digits(spread.high)],
            "rounds": spread.rounds,
            "rate": _digits(rate),
            "rate_unit": "TFLOP/s" if matmul else "GB/s",
            "formula": work.formula,
            "share_of_ceiling": _digits(rate / ceiling),
            "peak_bytes": timing.peak_bytes(ready.job, self.device),
            "result_bytes": ready.result_bytes,
            "relative_error": None if ready.error is None else _digits(ready.error),
        }
        if self.device.type == "cuda":
            calls = max(2, min(20, int(1000 / spread.median)))  # of a whole training step only a few
            row["host_us"] = _digits(timing.host_us(ready.job, self.device, calls))
            if spread.median < 0.05 and case.direction == FORWARD:
                try:
                    row["graph_ms"] = _digits(timing.graph_ms(ready.job))
                except RuntimeError as failure:
                    row["graph_ms"] = None
                    row["graph_reason"] = " ".join(str(failure).split())[:200]
        return row


def job(forward: Forward, inputs: Inputs, direction: str) -> Job:
    """The repetition that is timed: gradients are returned, not accumulated; no graph is kept."""

    def gradients(outputs: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(_tuple(outputs), inputs.differentiated(), inputs.douts)

    def no_grad(_: Any) -> Any:
        with torch.no_grad():
            return forward()

    if direction == FORWARD:
        return Job(no_grad)
    if direction == STEP:
        return Job(lambda _: forward())
    if direction == BACKWARD:
        return Job(gradients, setup=forward)
    return Job(lambda _: gradients(forward()))


def _refusal(case: Case, variant: Variant, reason: str, *, limit: bool = False) -> Outcome:
    """``limit``: the variant said beforehand that it does not do this, which is no failure."""
    return Outcome(case, variant, reason=reason, failed=variant.kind in ("backend", "option") and not limit)


def _product_ceiling(ceilings: dict[str, Any], case: Case) -> float:
    """A product in 16 bits may be slower than one in float32, whose operands it can be given as."""
    products = ceilings["matmul_tflop_s"]
    own = products[dtype_name(case.dtype)]
    return max(own, products.get("float32", own)) if case.dtype.itemsize < 4 else own


def _one_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _digits(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")
