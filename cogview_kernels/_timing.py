# SPDX-License-Identifier: Apache-2.0
"""Times callables and their memory: for ``python -m cogview_kernels.bench`` and for benchmarks/.

On a GPU, CUDA events stand around each call. Before each repetition a buffer of twice the L2 is read, so the
cache is cold and holds no dirty lines. The device is then kept busy for longer than the host needs to queue
the call, so only the device is timed; the host's own time is measured apart.

On a CPU, the clock is ``perf_counter``. Absolute times drift on shared machines; ratios from one interleaved
run hold.

On both, variants take turns, round by round, in one process on the same tensors. Each round has an order of
its own, so that no variant always finds the cache as the same other one leaves it. The median is reported,
with the quartiles as the spread.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogview_kernels import _extension


@dataclass(frozen=True)
class Job:
    """``run(setup())`` is one repetition; only ``run`` is timed."""

    run: Callable[[Any], Any]
    setup: Callable[[], Any] = lambda: None

    def __call__(self) -> Any:
        return self.run(self.setup())


@dataclass(frozen=True)
class Limits:
    """A measurement ends after ``seconds``, but not before ``min_rounds`` nor after ``max_rounds``."""

    seconds: float = 2.0
    min_rounds: int = 5
    max_rounds: int = 100


@dataclass(frozen=True)
class Spread:
    """Milliseconds."""

    median: float
    low: float
    high: float
    rounds: int


def spread(times_ms: list[float]) -> Spread:
    """Median and quartiles."""
    if len(times_ms) < 2:
        return Spread(times_ms[0], times_ms[0], times_ms[0], 1)
    low, _, high = statistics.quantiles(times_ms, n=4, method="inclusive")
    return Spread(statistics.median(times_ms), low, high, len(times_ms))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class CpuTimer:
    def __init__(self, device: torch.device) -> None:
        del device

    def __call__(self, job: Job) -> float:
        state = job.setup()
        start = time.perf_counter()
        job.run(state)
        return (time.perf_counter() - start) * 1e3


class CudaTimer:
    """One call between two events, with a cold L2 and a full queue."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.ones(max(2 * l2, 64 << 20) // 4, device=device)
        self.flushed = torch.empty((), device=device)
        self.host_us: dict[int, float] = {}
        start, end = self.events()
        start.record()
        torch.cuda._sleep(10_000_000)
        end.record()
        end.synchronize()
        self.cycles_per_us = 10_000_000 / (start.elapsed_time(end) * 1e3)

    @staticmethod
    def events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def __call__(self, job: Job) -> float:
        if id(job) not in self.host_us:
            self.host_us[id(job)] = host_us(job, self.device, calls=3)
        start, end = self.events()
        state = job.setup()
        torch.sum(self.flush, 0, out=self.flushed)
        torch.cuda._sleep(int(self.cycles_per_us * min(1.5 * self.host_us[id(job)] + 20, 20_000)))
        start.record()
        job.run(state)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def timer_for(device: torch.device) -> CpuTimer | CudaTimer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer(device)


def interleave(jobs: dict[str, Job], device: torch.device, limits: Limits) -> dict[str, list[float]]:
    """Milliseconds of every repetition of every job, taken in turns."""
    timer = timer_for(device)
    names = list(jobs)
    for name in names:  # warm-up: caches, allocator, clocks
        timer(jobs[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for turn in range(limits.max_rounds):
        if turn >= limits.min_rounds and time.perf_counter() - begin > limits.seconds:
            break
        for name in random.Random(turn).sample(names, len(names)):
            times[name].append(timer(jobs[name]))
    return times


def host_us(job: Job, device: torch.device, calls: int = 20) -> float:
    """Microseconds until a call returns to Python, the device not waited for: the cost of launching."""
    times = []
    for _ in range(calls):
        state = job.setup()
        synchronize(device)
        start = time.perf_counter()
        job.run(state)
        times.append((time.perf_counter() - start) * 1e6)
        synchronize(device)
    return statistics.median(times)


def _status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def peak_bytes(job: Job, device: torch.device) -> int | None:
    """Most memory held at once beyond what was held before, results included; None where it cannot be had.

    On a GPU, PyTorch's allocator tells. On a CPU, Linux keeps a record of the process's peak resident set,
    which counts native buffers too and is right to about a megabyte. What our kernels keep between calls is
    freed before the call, so that it counts.
    """
    if device.type == "cuda":
        state = job.setup()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = job.run(state)
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    try:
        state = job.setup()
        if _extension.native is not None:
            _extension.native.free_workspaces()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        before = _status_kb("VmRSS")
        result = job.run(state)
        del result
        return max(0, _status_kb("VmHWM") - before) * 1024
    except (OSError, AttributeError):
        return None
