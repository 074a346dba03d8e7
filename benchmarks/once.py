# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.once [op ...]``: calls what the benchmarks would time, once each, without timing it.

This fills Triton's cache (with ``--processes``, while something else keeps the host waiting), or gives a
profiler or a sanitizer the fewest launches that show every kernel. One line a call is printed before it.
Exit status 1: a call of one of our backends raised an error.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import torch

from benchmarks import OPS, checks, harness
from benchmarks.definitions import Case, Variant, benchmark_of


def call_alike(op: str, cases: list[Case], device: torch.device, options: harness.Options) -> bool:
    """Calls every wanted variant on one set of inputs; False if one of ours failed."""
    bench = benchmark_of(op)
    torch.manual_seed(0)
    inputs = bench.inputs(cases[0], device)
    good = True
    for case in cases:
        for tensor in inputs.differentiated():
            tensor.requires_grad_(case.direction != "fwd")
        for variant in bench.variants:
            if options.wants(case, variant) and not variant.why_not(case, device):
                print(f"{op} {case} {variant.name}", flush=True)
                good &= call(variant, case, inputs, device)
    return good


def call(variant: Variant, case: Case, inputs, device: torch.device) -> bool:
    try:
        harness.job(variant.prepare(inputs, case), inputs, case.direction)()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # an error of the kernel shows here
    except NotImplementedError as limit:  # said beforehand, which is no failure
        print(f"  left out: {limit}", flush=True)
    except Exception as failure:  # whatever a rival raises is its own affair, and ours is told of
        print(f"  {type(failure).__name__}: {' '.join(str(failure).split())[:300]}", flush=True)
        return variant.kind == "rival"
    return True


def call_check(check: checks.Check, device: torch.device, sizes: checks.Sizes) -> bool:
    print(f"check of attention, {check.name}", flush=True)
    check.run(device, sizes)
    return True


def tasks(chosen: argparse.Namespace) -> Iterator[tuple[Callable[..., bool], tuple]]:
    """Functions with their arguments, which another process can be sent."""
    device = torch.device(chosen.device)
    options = harness.Options(tiny=chosen.tiny, select=chosen.select)
    for op in chosen.ops or OPS:
        cases = list(dict.fromkeys(case for case, _ in harness.wanted(benchmark_of(op), device, options)))
        for together in harness.alike(cases):
            yield call_alike, (op, together, device, options)
    if chosen.checks:
        wanted, sizes = checks.chosen(chosen.tiny)
        yield from ((call_check, (check, device, sizes)) for check in wanted)


def succeeded(future: Future) -> bool:
    try:
        return future.result()
    except Exception as failure:  # of the inputs, or a process that died: the others go on
        print(f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}", flush=True)
        return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.once", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help="all when none is named")
    parser.add_argument("--select", default="", metavar="REGEX", help="as python -m benchmarks takes it")
    parser.add_argument("--checks", action="store_true", help="the checks of headlines, too")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--processes", type=int, default=1)
    chosen = parser.parse_args(arguments)
    if chosen.processes == 1:
        return 0 if all([function(*arguments) for function, arguments in tasks(chosen)]) else 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.processes, mp_context=context) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in tasks(chosen)]
        return 0 if all([succeeded(future) for future in futures]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
