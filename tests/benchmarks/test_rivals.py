# SPDX-License-Identifier: Apache-2.0
"""Every rival computes what it is timed for, and a wrong one is not timed."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks import OPS, harness
from benchmarks.harness import BOTH, FORWARD, Case, Variant
from benchmarks.rivals import attention
from benchmarks.shapes import AttentionShape
from benchmarks.timing import Limits

CPU = torch.device("cpu")
ONCE = Limits(0.0, 1, 1)
CEILINGS = {"copy_gb_s": 1.0, "matmul_tflop_s": {"float32": 1.0, "bfloat16": 1.0}}
# Compilation takes seconds a variant; `make gpu-check` in rehearsal runs these.
COMPILED = ("torch.compile", "FlexAttention")


def benchmark_of(op: str) -> harness.Benchmark:
    return importlib.import_module(f"benchmarks.bench_{op}").BENCHMARK


def quick(bench: harness.Benchmark) -> tuple[Variant, ...]:
    return tuple(v for v in bench.variants if not v.name.startswith(COMPILED))


def race(bench, cases, variants):
    return harness.race(bench, cases, CPU, CEILINGS, variants=variants, limits=ONCE)


@pytest.mark.parametrize("op", OPS)
def test_variants_equal_the_reference(op):
    bench = benchmark_of(op)
    cases = bench.cases(CPU, True)
    for first in {(case.shape, case.dtype): case for case in cases}.values():
        together = [c for c in cases if (c.shape, c.dtype) == (first.shape, first.dtype)]
        for case, outcome in race(bench, together, quick(bench)).items():
            refused = {v.name for v in quick(bench) if v.why_not(case, CPU)}
            assert not outcome.wrong
            assert set(outcome.skipped) == refused, outcome.skipped
            assert {row["variant"] for row in outcome.rows} == {v.name for v in quick(bench)} - refused
            for row in outcome.rows:
                assert row["ms"] > 0 and row["rate"] > 0 and row["formula"]


def test_attention_rivals_over_many_blocks():
    bench = benchmark_of("three_region_attention")
    shape = AttentionShape("many-blocks", B=2, H=2, T=640, D=32, w=64, W=3, P=150, text=8)
    cases = [Case(shape, torch.float32, way) for way in (FORWARD, BOTH)]
    rivals = tuple(v for v in quick(bench) if v.kind == "rival")
    for outcome in race(bench, cases, rivals).values():
        assert {"loop of SDPA calls", "original, eager", "dense causal SDPA"} <= set(outcome.times_ms)


def test_a_forced_kernel_is_the_one_that_runs():
    bench = benchmark_of("three_region_attention")
    case = bench.cases(CPU, True)[0]
    forced = {v.name: v.prepare(bench.inputs(case, CPU), case) for v in bench.variants if "SDPA, " in v.name}
    assert forced["dense causal SDPA, flash"]().shape == (2, 2, 96, 32)
    with pytest.raises(RuntimeError, match=r"No (viable|available)"):
        forced["dense causal SDPA, cuDNN"]()


@pytest.mark.parametrize("P", [0, 100, 150])
@pytest.mark.parametrize("T", [256, 400])
def test_gathered_block_mask_is_the_one_of_its_rule(T, P):
    w, W = 64, 2
    ordered = torch.stack([torch.randperm(T)[:P].sort().values for _ in range(2)])
    block_mask, columns = attention.gathered_block_mask(ordered, T, w, W)
    built = create_block_mask(block_mask.mask_mod, 2, None, T, columns + T, device="cpu", BLOCK_SIZE=128)
    assert torch.equal(block_mask.to_dense(), built.to_dense())
    assert torch.equal(block_mask.full_kv_num_blocks, built.full_kv_num_blocks)
    assert torch.equal(block_mask.kv_num_blocks, built.kv_num_blocks)


def test_a_wrong_rival_is_not_timed_and_a_wrong_backend_is_an_error():
    bench = benchmark_of("stable_softmax")
    case = bench.cases(CPU, True)[0]

    def off(kind):
        return Variant(f"off {kind}", lambda x, c: lambda: torch.softmax(3 * x.scores, -1), kind=kind)

    outcome = race(bench, [case], (off("rival"), off("backend")))[case]
    assert not outcome.rows
    assert "wrong by" in outcome.skipped["off rival"] and "wrong by" in outcome.wrong["off backend"]


def test_nan_is_wrong():
    nan = torch.full((2,), float("nan"))
    assert harness.relative_error((nan,), (torch.ones(2),)) == float("inf")


def test_a_bound_is_timed_unchecked():
    bench = benchmark_of("linear_cross_entropy")
    case = dataclasses.replace(bench.cases(CPU, True)[0], direction=BOTH)
    bounds = tuple(v for v in bench.variants if v.kind == "bound")
    rows = race(bench, [case], bounds)[case].rows
    assert [row["relative_error"] for row in rows] == [None]
