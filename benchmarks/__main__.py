# SPDX-License-Identifier: Apache-2.0
"""Times the ops against their rivals on the machine at hand: ``python -m benchmarks [op ...]``.

Per op, its tests run first. What is measured is saved under build/benchmarks after each variant, and moves to
the results that the report quotes when the op is finished. Figures of an op whose tests are red, of tiny
shapes and of a selection stay there. Exit status 1: tests are red, or a backend of ours failed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import BENCHMARKS, environment, harness, report, results, verdict
from benchmarks.definitions import benchmark_of

# For results that are not finished or not to be quoted.
APART = Path(__file__).resolve().parent.parent / "build" / "benchmarks"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "ops", nargs="*", metavar="op", help=f"of {', '.join(BENCHMARKS)}; all when none is named"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument(
        "--select",
        default="",
        metavar="REGEX",
        help='only what this is found in: "<shape>-<dtype>-<direction> <variant>"',
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes, no tests: to see that everything runs"
    )
    parser.add_argument(
        "--tested", type=Path, metavar="JUNIT_XML", help="do not run the tests, read their outcome"
    )
    parser.add_argument(
        "--stop-after",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="leave out what would begin later",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FOLDER",
        help="of the results; default: benchmarks/results for what may be quoted, else build/benchmarks",
    )
    chosen = parser.parse_args(arguments)
    if unknown := [op for op in chosen.ops if op not in BENCHMARKS]:
        parser.error(f"no op is called {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    return chosen


def device_named(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")


def keep_pages(device: torch.device) -> None:
    """Starts this program again with the allocator's settings, which are read before ``main`` runs."""
    if device.type == "cpu" and not any(name.startswith(("MALLOC_", "LD_PRELOAD")) for name in os.environ):
        os.environ.update(environment.ALLOCATOR)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]])


def tests_of(op: str, chosen: argparse.Namespace) -> str:
    if chosen.tested is not None:
        return verdict.of_report(op, chosen.tested)
    if chosen.tiny:
        return ""
    print(f"{op}: its tests", flush=True)
    return verdict.of_tests(op)


def run(op: str, device: torch.device, options: harness.Options, save: Path | None) -> bool:
    """Measures one op and saves its document anew after each variant. False: a backend of ours failed."""
    bench = benchmark_of(op)
    wanted = harness.wanted(bench, device, options)
    if not wanted:
        print(f"{op}: nothing is called {options.select!r}")
        return True
    print(f"{op}: {'tiny shapes' if options.tiny else 'its benchmark'}", flush=True)
    quotable = not (options.red_tests or options.tiny or options.select)
    good = True
    with tqdm(total=len(wanted), unit="variant", leave=False, disable=None) as bar:
        for document, outcome in harness.measure(bench, device, options):
            results.save(document, save or APART)
            bar.set_description(str(outcome.case), refresh=False)
            bar.update()
            if outcome.failed:
                good = False
                bar.write(f"FAILED: {outcome.case} {outcome.variant.name}: {outcome.reason}")
    path = results.save(document, save or (results.FOLDER if quotable else APART))
    print(f"{report.text_table(document)}\n\nsaved: {path}\n", flush=True)
    return good


def main() -> int:
    chosen = parse()
    device = device_named(chosen.device)
    keep_pages(device)
    deadline = time.monotonic() + chosen.stop_after
    failed = []
    for op in chosen.ops or BENCHMARKS:
        red = tests_of(op, chosen)
        options = harness.Options(chosen.tiny, chosen.select, deadline, red)
        try:
            good = run(op, device, options, chosen.save)
        except KeyboardInterrupt:
            print(f"{op}: interrupted; what was measured is under {chosen.save or APART}")
            return 130
        # Whoever brings the outcome of the tests has judged it already.
        if not good or (red and chosen.tested is None):
            failed.append(op)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
