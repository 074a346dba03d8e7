# SPDX-License-Identifier: Apache-2.0
"""Timing: what the package brings, and what only the benchmarks need: CUDA graphs, the machine's ceilings."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from cogview_kernels._timing import (
    CudaTimer,
    Job,
    Limits,
    Spread,
    host_us,
    interleave,
    peak_bytes,
    spread,
    synchronize,
)

__all__ = [
    "Job",
    "Limits",
    "Spread",
    "ceilings",
    "graph_ms",
    "host_us",
    "interleave",
    "peak_bytes",
    "spread",
    "synchronize",
]


def graph_ms(job: Job, calls: int = 20, replays: int = 10) -> float:
    """Milliseconds a call inside a CUDA graph of ``calls`` of them: warm cache, no host, no launch gaps."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            job()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            job()
    times = []
    for _ in range(replays):
        start, end = CudaTimer.events()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def ceilings(device: torch.device, dtypes: list[torch.dtype], *, tiny: bool = False) -> dict[str, Any]:
    """What this machine reaches at best, now: GB/s of a large copy, TFLOP/s of a large matrix product."""
    cuda = device.type == "cuda"
    limits = Limits(seconds=0.3, min_rounds=5, max_rounds=30)
    copy_bytes = (1 << 16) if tiny else (2 << 30) if cuda else (256 << 20)
    sizes: dict[str, int] = {}
    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    jobs = {"copy": Job(lambda _: target.copy_(source))}
    for dtype in dtypes:
        N = 64 if tiny else 8192 if cuda else _side_of_product(dtype)
        sizes[str(dtype).removeprefix("torch.")] = N
        jobs[str(dtype)] = _product(N, device, dtype)
    medians = {name: spread(times).median for name, times in interleave(jobs, device, limits).items()}
    return {
        "copy_gb_s": 2 * copy_bytes / medians.pop("copy") / 1e6,
        "copy_bytes": copy_bytes,
        "matmul_tflop_s": {name: 2 * N**3 / medians[f"torch.{name}"] / 1e9 for name, N in sizes.items()},
        "matmul_size": sizes,
    }


def _product(N: int, device: torch.device, dtype: torch.dtype) -> Job:
    a, b = (torch.randn(N, N, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Job(lambda _: torch.mm(a, b, out=out))


def _side_of_product(dtype: torch.dtype) -> int:
    """2,048, or less where a CPU would take over half a second: one without 16-bit units takes a minute."""
    N, cpu = 256, torch.device("cpu")
    seconds = host_us(_product(N, cpu, dtype), cpu, calls=3) / 1e6
    while N < 2048 and 8 * seconds < 0.5:
        N, seconds = 2 * N, 8 * seconds
    return N
