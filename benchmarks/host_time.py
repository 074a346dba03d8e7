# SPDX-License-Identifier: Apache-2.0
"""Host time: microseconds that a call of each op costs on a CPU when there is next to nothing to compute.

``python -m benchmarks.host_time``                    the ops of this checkout
``python -m benchmarks.host_time --against FOLDER``   this checkout and another one, in turns, and the ratios

Inputs are one row or a few numbers, on one thread. Three ways to call: "forward" on tensors that require no
gradient, "recorded" on tensors that do, and "backward" of what was recorded. ``F.layer_norm`` is a yardstick
of the machine's pace. Other work on the machine only adds time, so the smallest median of several rounds
counts. Exit status 1: a ratio is above ``--at-most``.

This file uses only the public names of ``cogview_kernels``, and of whatever checkout PYTHONPATH leads to.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
SECONDS, LEAST = 0.3, 100  # of calls for one figure

Times = dict[str, dict[str, float]]


def ops() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Name -> a function and its tensors. Floating-point tensors may require a gradient."""
    import torch
    import torch.nn.functional as F

    import cogview_kernels as k

    torch.manual_seed(0)
    row, weight, bias = torch.randn(1, 64), torch.randn(64), torch.randn(64)
    q, key, value = (torch.randn(1, 1, 32, 32) for _ in range(3))
    layout = k.ThreeRegionLayout(torch.tensor([[0, 3]]), block_size=8, window_blocks=2)
    cache, length = torch.randn(1, 1, 32, 32), torch.tensor([20])
    vocabulary, target = torch.randn(100, 64), torch.tensor([7])
    sandwich = (row, row.clone(), weight, bias, weight.clone(), bias.clone())
    linear = torch.randn(8, 64)
    found = {
        "F.layer_norm": (lambda x, w, b: F.layer_norm(x, (64,), w, b), (row, weight, bias)),
        "layer_norm": (k.layer_norm, (row, weight, bias)),
        "sandwich_layer_norm": (k.sandwich_layer_norm, sandwich),
        "rms_norm": (k.rms_norm, (row, weight)),
        "sandwich_rms_norm": (k.sandwich_rms_norm, (row, row.clone(), weight, weight.clone())),
        "stable_softmax": (k.stable_softmax, (row,)),
        "linear_cross_entropy": (k.linear_cross_entropy, (row, vocabulary, target)),
        "three_region_attention": (
            lambda a, b, c: k.three_region_attention(a, b, c, layout),
            (q, key, value),
        ),
        "decode_attention": (k.decode_attention, (q[:, :, :1], cache, cache.clone(), length)),
    }
    if hasattr(k, "decode_linear"):  # older checkouts have none
        found["decode_linear"] = (lambda x: k.decode_linear(x, linear), (row,))
    if hasattr(k, "decode_step"):
        found["decode_step"] = _step(k)
    return found


def _step(k):
    """Of one layer of width 64, in a cache of eight positions."""
    import torch

    norm, square = (torch.ones(64), torch.zeros(64)), (torch.randn(64, 64), torch.zeros(64))
    qkv = torch.randn(192, 64), torch.zeros(192)
    stack = k.LayerStack((k.LayerWeights(norm, qkv, square, norm, norm, square, square, norm),), norm)
    cache, lengths = torch.zeros(1, 2, 1, 2, 8, 32), torch.tensor([4])
    return lambda x: k.decode_step(x, stack, cache, lengths), (torch.randn(1, 1, 64),)


def measure() -> Times:
    """Microseconds a call, the median of many, by op and way to call."""
    import torch

    torch.set_num_threads(1)
    return {name: _one(function, tensors) for name, (function, tensors) in ops().items()}


def _one(function: Callable[..., Any], tensors: tuple[Any, ...]) -> dict[str, float]:
    import torch

    found = {"forward": _median_us(lambda _: function(*tensors))}
    recorded = [x.clone().requires_grad_(x.is_floating_point()) for x in tensors]
    leaves = [x for x in recorded if x.requires_grad]
    try:
        outputs = function(*recorded)
        torch.autograd.grad(_sum(outputs), leaves)
    except (NotImplementedError, RuntimeError):
        return found  # the op has no backward
    douts = [torch.ones_like(x) for x in _tuple(outputs)]
    found["recorded"] = _median_us(lambda _: function(*recorded))
    found["backward"] = _median_us(
        lambda graph: torch.autograd.grad(graph, leaves, douts), lambda: _tuple(function(*recorded))
    )
    return found


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _sum(outputs: Any) -> Any:
    return sum(x.sum() for x in _tuple(outputs))


def _median_us(call: Callable[[Any], Any], setup: Callable[[], Any] = lambda: None) -> float:
    """``setup`` runs before each call and is not timed. Each call is timed alone: where other work takes the
    core for a while, one call shows it and the median does not."""
    clock, samples = time.perf_counter, list[float]()
    end = clock() + SECONDS
    while len(samples) < LEAST or clock() < end:
        state = setup()
        start = clock()
        call(state)
        samples.append(clock() - start)
    return statistics.median(samples[len(samples) // 10 :]) * 1e6  # the first ones warm up


def child(root: Path) -> Times:
    """``measure()`` in a process of its own, with the packages of the checkout ``root``."""
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    # By its path: as a module, this file would find the packages of the folder that it is started in.
    command = [sys.executable, str(Path(__file__).resolve()), "--json", str(root)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"host_time: the ops of {root} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def smallest(rounds: list[Times]) -> Times:
    first = rounds[0]
    return {op: {way: min(r[op][way] for r in rounds) for way in ways} for op, ways in first.items()}


def compare(other: Path, rounds: int) -> tuple[Times, Times]:
    """Of this checkout and of the other, taken in turns."""
    ours, theirs = list[Times](), list[Times]()
    for turn in range(rounds):
        for times, root in ((ours, ROOT), (theirs, other))[:: 1 if turn % 2 == 0 else -1]:
            times.append(child(root))
    return smallest(ours), smallest(theirs)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_time", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="another checkout, its extension built"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each checkout, default 5")
    parser.add_argument(
        "--at-most", type=float, metavar="RATIO", help="exit status 1 where ours / theirs is above"
    )
    parser.add_argument("--json", type=Path, metavar="ROOT", help="one round of the package there, as JSON")
    chosen = parser.parse_args()
    if chosen.json:
        import cogview_kernels

        if not Path(cogview_kernels.__file__).is_relative_to(chosen.json):
            raise SystemExit(f"{cogview_kernels.__file__} was imported, which is elsewhere")
        print(json.dumps(measure()))
        return 0
    if chosen.against is None:
        times = smallest([child(ROOT) for _ in range(chosen.rounds)])
        table = [[op, way, us] for op, ways in times.items() for way, us in ways.items()]
        print(tabulate(table, ["op", "way", "us"], floatfmt=".1f"))
        return 0
    ours, theirs = compare(chosen.against.resolve(), chosen.rounds)
    table = [
        [op, way, us, theirs[op][way], us / theirs[op][way]]
        for op, ways in ours.items()
        for way, us in ways.items()
        if way in theirs.get(op, {})
    ]
    print(
        tabulate(
            table, ["op", "way", "ours, us", "theirs, us", "ratio"], floatfmt=("", "", ".1f", ".1f", ".2f")
        )
    )
    slower = [f"{op} {way}" for op, way, *_, ratio in table if chosen.at_most and ratio > chosen.at_most]
    if slower:
        print(f"above {chosen.at_most}: {', '.join(slower)}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
