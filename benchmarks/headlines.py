# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.headlines``: whether the Triton kernels are right on this GPU, then the figures that
matter most, most valuable first, in one process and about two minutes.

Nothing is compiled but this library's own kernels, unless ``--rivals`` adds FlexAttention, ``torch.compile``
and what is installed. Each line is printed and saved before the next begins, so whatever cuts the run keeps
what was done. Exit status 1: a check is red, or a backend of ours failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import OPS, checks, environment, harness, results, timing, verdict
from benchmarks.definitions import BACKWARD, BOTH, FORWARD, Case, benchmark_of
from benchmarks.rivals import attention, decode, linear

_DENSE = ("dense causal SDPA, flash", "dense causal SDPA, cuDNN", attention.LOOP)
_ATTENTION, _SANDWICH = "three_region_attention", "sandwich_layer_norm"
_LOSS, _DECODE, _SOFTMAX = "linear_cross_entropy", "decode_attention", "stable_softmax"
_LOCAL, _LINEAR = "local_attention_2d", "decode_linear"


class Wanted(NamedTuple):
    """A race: the ``variants`` of an op on one shape in bfloat16, in each of the directions."""

    op: str
    shape: str
    directions: tuple[str, ...]
    variants: tuple[str, ...]


def _plan() -> Iterator[Wanted]:
    ways = (FORWARD, BACKWARD)
    yield Wanted(_ATTENTION, "paper", ways, ("triton", *_DENSE))
    yield Wanted(_SANDWICH, "width", ways, ("triton", "cuda", "eager PB-relax", "eager F.layer_norm"))
    shares = tuple(f"triton, extra_memory={share}" for share in ("0.12", "0.5", "1"))
    yield Wanted(_LOSS, "cogview", (BOTH,), ("triton", *shares, "matrix products alone"))
    for shape in ("cogview", "cogview-16", "paper", "16k"):
        yield Wanted(_DECODE, shape, (FORWARD,), ("triton", "cuda", decode.CACHE, decode.GATHERED))
    for shape in ("qkv", "out", "up", "down"):
        yield Wanted(_LINEAR, shape, (FORWARD,), ("triton", linear.PLAIN, linear.ADDMM))
    for shape in ("cogview", "long", "16k"):
        yield Wanted(_ATTENTION, shape, ways, ("triton", *_DENSE))
    for shape in ("64x64", "32x32"):
        yield Wanted(_LOCAL, shape, ways, ("triton", "dense SDPA, mask"))
    yield Wanted("layer_norm", "width", ways, ("triton", "cuda", "eager F.layer_norm"))
    for op in ("sandwich_rms_norm", "rms_norm"):
        yield Wanted(op, "width", ways, ("triton", "cuda", "eager", "eager F.rms_norm"))
    for shape in ("width", "vocabulary", "causal"):
        softmax = ("eager softmax", "eager softmax, mask as bias")
        yield Wanted(_SOFTMAX, shape, ways, ("triton", "cuda", *softmax))
    for shape in ("qkv-16", "out-16", "up-16", "down-16"):
        yield Wanted(_LINEAR, shape, (FORWARD,), ("triton", linear.PLAIN, linear.ADDMM))


PLAN = tuple(_plan())

# What must be compiled first or be installed: by op and shape, added with --rivals.
_LIBRARIES = ("Liger LayerNorm", "quack LayerNorm", "Apex LayerNorm")
_NORMS = ("torch.compile PB-relax", "torch.compile F.layer_norm", *_LIBRARIES)
_RMS_NORMS = ("torch.compile", "Liger RMSNorm", "quack RMSNorm")
RIVALS = {
    (_ATTENTION, "paper"): (attention.GATHERED, "FlexAttention, mask"),
    (_SANDWICH, "width"): _NORMS,
    ("layer_norm", "width"): _NORMS,
    ("sandwich_rms_norm", "width"): _RMS_NORMS,
    ("rms_norm", "width"): _RMS_NORMS,
    (_LOCAL, "64x64"): ("FlexAttention, mask",),
    (_SOFTMAX, "causal"): ("torch.compile PB-relax",),
    (_LOSS, "cogview"): ("Liger", "Cut Cross-Entropy, exact"),
}


def with_rivals(wanted: Wanted) -> Wanted:
    return wanted._replace(variants=wanted.variants + RIVALS.get((wanted.op, wanted.shape), ()))


@dataclasses.dataclass(frozen=True)
class Run:
    """``seconds``: what would begin later is left out. ``tested``: JUnit XML of the tests, where they ran."""

    device: torch.device
    ops: tuple[str, ...] = OPS
    tiny: bool = False
    rivals: bool = False
    seconds: float = 120.0
    tested: Path | None = None


class Headlines:
    """The growing documents, one per op as ``benchmarks.results`` has them."""

    def __init__(self, out: Path, run: Run) -> None:
        self.out, self.run, self.device = out, run, run.device
        self.start = time.monotonic()
        self.deadline = self.start + run.seconds
        self.environment = environment.describe(run.device)
        self.red: list[str] = []  # names of checks
        self.failed = False  # a backend of ours
        self.documents: dict[str, dict[str, Any]] = {}
        self.say(str(self.environment.get("device")))

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.1f} s] {text}", flush=True)

    def save(self) -> None:
        results.write_json(self.out / "results.json", self.documents)

    def check(self) -> bool:
        chosen, sizes = checks.chosen(self.run.tiny)
        for check in chosen:
            try:
                good, detail = check.run(self.device, sizes)
            except Exception as failure:  # the next check may tell more
                good, detail = False, f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            if not good:
                self.red.append(check.name)
            self.say(f"{'ok    ' if good else 'FAILED'} attention, {check.name}: {detail}")
        return not self.red

    def measure(self) -> None:
        ceilings = timing.ceilings(self.device, [torch.bfloat16], tiny=self.run.tiny)
        copy, product = ceilings["copy_gb_s"], ceilings["matmul_tflop_s"]["bfloat16"]
        self.say(f"copy {copy:.0f} GB/s, product {product:.0f} TFLOP/s")
        for wanted in PLAN:
            seen = self.run.tiny and wanted.op in self.documents  # every tiny shape would be the same one
            if seen or wanted.op not in self.run.ops:
                continue
            document = self.documents.setdefault(wanted.op, self.document(wanted.op, ceilings))
            for outcome in self.race(wanted, ceilings):
                self.take(outcome, document)
                self.save()
        for document in self.documents.values():
            document["finished"] = all(entry["reason"] != "out of time" for entry in document["skipped"])
        self.save()

    def document(self, op: str, ceilings: dict[str, Any]) -> dict[str, Any]:
        red = f"red on this GPU: attention, {'; '.join(self.red)}" if self.red else ""
        if not red and self.run.tested is not None and self.run.tested.exists():
            red = verdict.of_report(op, self.run.tested)
        return {
            "op": op,
            "baseline": benchmark_of(op).baseline,
            "environment": self.environment,
            "tiny": self.run.tiny,
            "finished": False,
            "ceilings": ceilings,
            "red_tests": red,
            "rows": [],
            "skipped": [],
        }

    def take(self, outcome: harness.Outcome, document: dict[str, Any]) -> None:
        case, name = str(outcome.case), outcome.variant.name
        self.failed |= outcome.failed
        if outcome.row is None:
            document["skipped"].append({"case": case, "variant": name, "reason": outcome.reason})
            self.say(f"{document['op']} {case} {name}: {'FAILED: ' * outcome.failed}{outcome.reason}")
        else:
            document["rows"].append(outcome.row)
            self.say(f"{document['op']} {case} {line(outcome.row)}")

    def race(self, wanted: Wanted, ceilings: dict[str, Any]) -> Iterator[harness.Outcome]:
        bench = dataclasses.replace(benchmark_of(wanted.op), limits=lambda *_: timing.Limits(0.2, 7, 60))
        every = [case for case in bench.cases(self.device, self.run.tiny) if case.dtype == torch.bfloat16]
        shape = every[0].shape.name if self.run.tiny else wanted.shape
        ways = wanted.directions
        cases = [case for case in every if case.shape.name == shape and case.direction in ways]
        variants = (with_rivals(wanted) if self.run.rivals else wanted).variants
        options = _Only(tiny=self.run.tiny, deadline=self.deadline, variants=variants)
        yield from harness.Race(bench, self.device, ceilings, options).run(cases)


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
    parser.add_argument("ops", nargs="*", metavar="op", help="all when none is named")
    parser.add_argument("--out", type=Path, default=Path("build/headlines"), help="for the results")
    parser.add_argument("--seconds", type=float, default=120, help="what would begin later is left out")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: to see that everything runs")
    parser.add_argument(
        "--rivals", action="store_true", help="rivals that must be compiled or installed, too"
    )
    parser.add_argument("--tested", type=Path, metavar="JUNIT_XML", help="outcome of the tests, if it exists")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    chosen = parser.parse_args()
    device, ops = torch.device(chosen.device), tuple(chosen.ops) or OPS
    run = Run(device, ops, chosen.tiny, chosen.rivals, chosen.seconds, chosen.tested)
    headlines = Headlines(chosen.out, run)
    good = headlines.check()
    headlines.measure()
    return 0 if good and not headlines.failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
