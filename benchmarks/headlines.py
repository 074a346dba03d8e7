# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.headlines``: whether the Triton kernels are right on this GPU, then the figures that
matter most, most valuable first, in one process and about two minutes.

Nothing is compiled but this library's own kernels: no FlexAttention, no ``torch.compile``. Each line is
printed and saved before the next begins, so whatever cuts the run keeps what was done. Exit status 1: a check
is red.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import environment, harness, results, timing
from benchmarks.definitions import BACKWARD, BOTH, FORWARD, Case, benchmark_of
from benchmarks.rivals import attention
from cogview_kernels import ThreeRegionLayout, three_region_attention

_DENSE = ("dense causal SDPA, flash", "dense causal SDPA, cuDNN", attention.LOOP)
_ATTENTION, _SANDWICH = "three_region_attention", "sandwich_layer_norm"
_LOSS, _DECODE, _SOFTMAX = "linear_cross_entropy", "decode_attention", "stable_softmax"


class Wanted(NamedTuple):
    op: str
    shape: str
    direction: str
    variants: tuple[str, ...]


def _plan() -> Iterator[Wanted]:
    ways = (FORWARD, BACKWARD)
    for way in ways:
        yield Wanted(_ATTENTION, "paper", way, ("triton", *_DENSE))
    for way in ways:
        yield Wanted(_SANDWICH, "width", way, ("triton", "cuda", "eager PB-relax"))
    shares = tuple(f"triton, extra_memory={share}" for share in ("0.12", "0.5", "1"))
    yield Wanted(_LOSS, "cogview", BOTH, ("triton", *shares, "matrix products alone"))
    for shape in ("cogview", "cogview-16", "paper", "16k"):
        yield Wanted(_DECODE, shape, FORWARD, ("triton", "cuda", "SDPA over the cache"))
    for shape in ("cogview", "long", "16k"):
        for way in ways:
            yield Wanted(_ATTENTION, shape, way, ("triton", *_DENSE))
    for way in ways:
        yield Wanted("layer_norm", "width", way, ("triton", "eager F.layer_norm"))
    for shape in ("width", "vocabulary", "causal"):
        for way in ways:
            yield Wanted(_SOFTMAX, shape, way, ("triton", "cuda", "eager softmax"))


PLAN = tuple(_plan())

# Name, dtype, largest |q| and |k| (None: as they are drawn), D, dropout, allowed error of the output.
CHECKS: tuple[tuple[str, torch.dtype, float | None, int, float, float], ...] = (
    ("bf16", torch.bfloat16, None, 64, 0.0, 2e-2),
    ("bf16, D=128", torch.bfloat16, None, 128, 0.0, 2e-2),
    ("bf16, dropout", torch.bfloat16, None, 64, 0.1, 2e-2),
    ("fp16", torch.float16, None, 64, 0.0, 4e-3),
    ("fp16, q and k up to 2,000", torch.float16, 2e3, 64, 0.0, 5e-2),
    ("fp16, q and k up to 65,504", torch.float16, 65504.0, 64, 0.0, float("inf")),
    ("bf16, q and k up to 65,280", torch.bfloat16, 65280.0, 64, 0.0, float("inf")),
    ("fp32", torch.float32, None, 64, 0.0, 1e-4),
)


def check(
    device: torch.device, dtype: torch.dtype, largest: float | None, D: int, dropout_p: float, allowed: float
) -> tuple[bool, str]:
    """Whether attention with its backward is finite, gives the same bits twice, and errs little enough."""
    generator = torch.Generator().manual_seed(1)
    T = 700
    q, k, v, dout = (torch.randn(2, 2, T, D, generator=generator) for _ in range(4))
    if largest is not None:
        q, k = (x / x.abs().max() * largest for x in (q, k))
    q, k, v, dout = (x.to(dtype).to(device) for x in (q, k, v, dout))
    pivots = torch.stack([torch.randperm(T, generator=generator)[:200] for _ in range(2)])
    layout = ThreeRegionLayout(pivots.to(device), 64, 3, 0.7)

    def run(backend: str, *tensors: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = three_region_attention(*leaves, layout, dropout_p=dropout_p, seed=5, backend=backend)
        assert isinstance(out, Tensor)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    ours, again = run("triton", q, k, v), run("triton", q, k, v)
    truth = run("reference", q.double(), k.double(), v.double())
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    finite = all(bool(x.isfinite().all()) for x in ours)
    errors = [harness.relative_error((a,), (t,)) for a, t in zip(ours, truth, strict=True)]
    # Where one key takes everything, dq and dk are rounding alone: out and dv can be judged.
    judged = errors[1:] if largest is None else errors[3:]
    good = same and finite and errors[0] <= allowed and max(judged) <= 3 * allowed
    found = " ".join(
        f"{name} {error:.1e}" for name, error in zip(("out", "dq", "dk", "dv"), errors, strict=True)
    )
    return good, f"same bits {same}, finite {finite}, {found}"


class Headlines:
    """The growing documents, one per op as ``benchmarks.results`` has them, and the checks."""

    def __init__(self, out: Path, device: torch.device, tiny: bool, seconds: float) -> None:
        self.out, self.device, self.tiny = out, device, tiny
        self.start = time.monotonic()
        self.deadline = self.start + seconds
        self.environment = environment.describe(device)
        self.checks: list[dict[str, Any]] = []
        self.documents: dict[str, dict[str, Any]] = {}
        self.say(str(self.environment.get("device")))

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.1f} s] {text}", flush=True)

    def save(self) -> None:
        results.write_json(self.out / "checks.json", self.checks)
        results.write_json(self.out / "results.json", self.documents)

    def check(self) -> bool:
        for name, *arguments in CHECKS:
            try:
                good, detail = check(self.device, *arguments)
            except Exception as failure:  # the next check may tell more
                good, detail = False, f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            self.checks.append({"name": f"attention, {name}", "good": good, "detail": detail})
            self.save()
            self.say(f"{'ok    ' if good else 'FAILED'} attention, {name}: {detail}")
        return all(entry["good"] for entry in self.checks)

    def measure(self) -> None:
        ceilings = timing.ceilings(self.device, [torch.bfloat16], tiny=self.tiny)
        copy, product = ceilings["copy_gb_s"], ceilings["matmul_tflop_s"]["bfloat16"]
        self.say(f"copy {copy:.0f} GB/s, product {product:.0f} TFLOP/s")
        red = "" if all(entry["good"] for entry in self.checks) else "checks on this GPU are red"
        for wanted in PLAN:
            document = self.documents.setdefault(wanted.op, {
                "op": wanted.op,
                "baseline": benchmark_of(wanted.op).baseline,
                "environment": self.environment,
                "tiny": self.tiny,
                "finished": False,
                "ceilings": ceilings,
                "red_tests": red,
                "rows": [],
                "skipped": [],
            })  # fmt: skip
            for outcome in self.race(wanted, ceilings):
                if outcome.row is None:
                    entry = {
                        "case": str(outcome.case),
                        "variant": outcome.variant.name,
                        "reason": outcome.reason,
                    }
                    document["skipped"].append(entry)
                    self.say(f"{outcome.case} {outcome.variant.name}: {outcome.reason}")
                else:
                    document["rows"].append(outcome.row)
                    self.say(f"{wanted.op} {outcome.case} {line(outcome.row)}")
                self.save()
        for document in self.documents.values():
            document["finished"] = time.monotonic() < self.deadline
        self.save()

    def race(self, wanted: Wanted, ceilings: dict[str, Any]) -> Iterator[harness.Outcome]:
        bench = dataclasses.replace(benchmark_of(wanted.op), limits=lambda *_: timing.Limits(0.2, 7, 60))
        cases = [
            case
            for case in bench.cases(self.device, self.tiny)
            if case.dtype == torch.bfloat16 and case.direction == wanted.direction
            and (self.tiny or case.shape.name == wanted.shape)
        ]  # fmt: skip
        options = _Only(tiny=self.tiny, deadline=self.deadline, variants=wanted.variants)
        yield from harness.Race(bench, self.device, ceilings, options).run(cases[:1])


@dataclasses.dataclass(frozen=True)
class _Only(harness.Options):
    variants: tuple[str, ...] = ()

    def wants(self, case: Case, variant: harness.Variant) -> bool:
        return variant.name in self.variants


def line(row: dict[str, Any]) -> str:
    text = f"{row['variant']}: {row['ms']} ms, {row['rate']} {row['rate_unit']}, "
    text += f"{100 * row['share_of_ceiling']:.0f} %"
    if row.get("graph_ms"):
        text += f", in a graph {1e3 * row['graph_ms']:.1f} us"
    return text + (f", host {row['host_us']} us" if "host_us" in row else "")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.headlines", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("build/headlines"), help="for the results")
    parser.add_argument("--seconds", type=float, default=120, help="what would begin later is left out")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: to see that everything runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    chosen = parser.parse_args()
    headlines = Headlines(chosen.out, torch.device(chosen.device), chosen.tiny, chosen.seconds)
    good = headlines.check()
    headlines.measure()
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
