# SPDX-License-Identifier: Apache-2.0
"""Timing helpers: what is timed, how often, and what memory is counted."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import environment, timing
from benchmarks.timing import Job, Limits

CPU = torch.device("cpu")


def test_spread_is_median_and_quartiles():
    spread = timing.spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.low, spread.median, spread.high, spread.rounds) == (2.0, 3.0, 4.0, 5)
    assert timing.spread([7.0]).median == 7.0


def test_variants_take_turns_behind_each_of_the_others():
    order = []
    jobs = {name: Job(lambda _, name=name: order.append(name)) for name in "abc"}
    times = timing.interleave(jobs, CPU, Limits(seconds=0.0, min_rounds=20, max_rounds=20))
    assert {name: len(t) for name, t in times.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]  # the first one warms up
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {turn[i : i + 2] for turn in rounds for i in (0, 1)} == {"ab", "ac", "ba", "bc", "ca", "cb"}


class Clock:
    """Moves only when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_only_run_is_timed(clock):
    job = Job(run=lambda _: clock.pass_by(0.002), setup=lambda: clock.pass_by(0.02))
    times = timing.interleave({"job": job}, CPU, Limits(seconds=0.0, min_rounds=5, max_rounds=5))
    assert times["job"] == pytest.approx([2.0] * 5)


def test_a_measurement_ends_after_its_seconds(clock):
    job = Job(run=lambda _: clock.pass_by(0.3))
    times = timing.interleave({"job": job}, CPU, Limits(seconds=1.0, min_rounds=2, max_rounds=50))
    assert len(times["job"]) == 4


def test_setup_feeds_run():
    assert Job(run=lambda state: state + 1, setup=lambda: 41)() == 42


def test_peak_memory_counts_what_is_freed_again():
    mebibytes = 96

    def run(_):
        scratch = torch.ones(mebibytes << 18)
        return scratch.sum()

    peak = timing.peak_bytes(Job(run), CPU)
    if peak is None:
        pytest.skip("this kernel keeps no resettable record of peak memory")
    assert 0.9 * (mebibytes << 20) < peak < 1.5 * (mebibytes << 20)


def test_ceilings_are_positive():
    found = timing.ceilings(CPU, [torch.float32, torch.bfloat16], tiny=True)
    assert found["copy_gb_s"] > 0
    assert set(found["matmul_tflop_s"]) == {"float32", "bfloat16"}
    assert all(rate > 0 for rate in found["matmul_tflop_s"].values())


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("Tesla V100-SXM2-32GB", "tesla-v100-sxm2-32gb"),
        ("Intel(R) Xeon(R) Processor, AMX", "intel-xeon-amx"),
        ("AMD EPYC, AVX512BF16", "amd-epyc-avx512bf16"),
        ("Intel(R) Core(TM) i7-9700K CPU @ 3.60GHz", "intel-core-i7-9700k"),
        ("AMD EPYC 9R14 96-Core Processor", "amd-epyc-9r14-96-core"),
    ],
)
def test_device_folder(name, folder):
    assert environment.device_folder(name) == folder


def test_generations_of_a_cpu_that_share_a_name_have_folders_of_their_own(instruction_set):
    folders = []
    for isa in ("portable", "avx2"):
        instruction_set(isa)
        folders.append(environment.describe(CPU)["folder"])
        assert folders[-1].endswith(isa)
    assert folders[0] != folders[1]


def test_environment_names_what_sways_a_timing():
    block = environment.describe(CPU)
    for key in ("device", "torch", "python", "cpu_threads", "allocator", "commit", "date"):
        assert block[key], key


@pytest.mark.gpu
def test_events_and_graphs_on_a_gpu():
    device = torch.device("cuda", 0)
    x = torch.randn(1 << 24, device=device)
    job = Job(lambda _: x * 2)
    times = timing.interleave({"job": job}, device, Limits(seconds=0.0, min_rounds=5, max_rounds=5))
    assert 0 < timing.spread(times["job"]).median < 100
    assert 0 < timing.graph_ms(Job(lambda _: x[:1024] * 2)) < 10
    assert timing.peak_bytes(job, device) == x.numel() * 4
    assert 0 < timing.host_us(job, device) < 100_000
