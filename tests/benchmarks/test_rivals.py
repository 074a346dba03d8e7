# SPDX-License-Identifier: Apache-2.0
"""Every rival computes what it is timed for, and a wrong one is not timed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks import BENCHMARKS, OPS, harness
from benchmarks.definitions import BOTH, FORWARD, Benchmark, Case, Variant, benchmark_of
from benchmarks.rivals import attention
from benchmarks.shapes import AttentionShape, Regions
from cogview_kernels import _backends

CPU = torch.device("cpu")
TINY = harness.Options(tiny=True)
CEILINGS = {"copy_gb_s": 1.0, "matmul_tflop_s": {"float32": 1.0, "bfloat16": 1.0}}
# Compilation takes seconds a variant; `make gpu-check` in rehearsal runs these.
COMPILED = ("torch.compile", "FlexAttention")


def quick(bench: Benchmark) -> tuple[Variant, ...]:
    return tuple(v for v in bench.variants if not v.name.startswith(COMPILED))


def race(bench, cases, variants):
    """Outcomes by case, then by variant."""
    found = {case: {} for case in cases}
    few = dataclasses.replace(bench, backends=(), rivals=variants)
    for outcome in harness.Race(few, CPU, CEILINGS, TINY).run(cases):
        assert outcome.variant.name not in found[outcome.case]
        found[outcome.case][outcome.variant.name] = outcome
    return found


@pytest.mark.parametrize("op", BENCHMARKS)
def test_variants_equal_the_reference(op):
    bench = benchmark_of(op)
    cases = bench.cases(CPU, True)
    for together in harness.alike(cases):
        # tests/kernels holds every backend to its budget in every dtype; here one dtype shows the right call.
        first = together[0].dtype == cases[0].dtype
        variants = tuple(v for v in quick(bench) if first or v.kind != "backend")
        for case, outcomes in race(bench, together, variants).items():
            refused = {v.name for v in variants if v.why_not(case, CPU)}
            assert not [o.reason for o in outcomes.values() if o.failed]
            skipped = {name: o.reason for name, o in outcomes.items() if o.row is None}
            assert set(skipped) == refused, skipped
            assert set(outcomes) == {v.name for v in variants}
            for name, outcome in outcomes.items():
                if row := outcome.row:
                    assert row["variant"] == name
                    assert row["ms"] > 0 and row["rate"] > 0 and row["formula"]


@pytest.mark.parametrize("op", OPS)
def test_every_backend_of_the_op_is_raced(op):
    bench = benchmark_of(op)
    case = bench.cases(CPU, True)[0]
    inputs = bench.inputs(case, CPU)
    written = {"reference"}
    for name in _backends.BACKENDS:
        try:
            bench.backend(name).prepare(inputs, case)()
        except NotImplementedError as error:
            assert f"no {name} backend" in str(error)
            continue
        except RuntimeError as error:
            assert f"backend '{name}' cannot run" in str(error)
        written.add(name)
    assert {*bench.backends, "reference"} == written


def test_attention_rivals_over_many_blocks():
    bench = benchmark_of("three_region_attention")
    shape = AttentionShape("many-blocks", B=2, H=2, T=640, D=32, regions=Regions(64, 3, 150, text=8))
    cases = [Case(shape, torch.float32, way) for way in (FORWARD, BOTH)]
    rivals = tuple(v for v in quick(bench) if v.kind == "rival")
    for outcomes in race(bench, cases, rivals).values():
        timed = {name for name, outcome in outcomes.items() if outcome.row}
        assert {"loop of SDPA calls", "original, eager", "dense causal SDPA"} <= timed


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
    sorted_pivots = torch.stack([torch.randperm(T)[:P].sort().values for _ in range(2)])
    block_mask, columns = attention.gathered_block_mask(sorted_pivots, T, 64, 2)
    built = create_block_mask(block_mask.mask_mod, 2, None, T, columns + T, device="cpu", BLOCK_SIZE=128)
    assert torch.equal(block_mask.to_dense(), built.to_dense())
    assert torch.equal(block_mask.full_kv_num_blocks, built.full_kv_num_blocks)
    assert torch.equal(block_mask.kv_num_blocks, built.kv_num_blocks)


def test_a_wrong_rival_is_not_timed_and_a_wrong_backend_is_an_error():
    bench = benchmark_of("stable_softmax")
    case = bench.cases(CPU, True)[0]

    def off(kind):
        return Variant(f"off {kind}", lambda x, c: lambda: torch.softmax(3 * x.scores, -1), kind=kind)

    outcomes = race(bench, [case], (off("rival"), off("backend")))[case]
    assert all(outcome.row is None and "wrong by" in outcome.reason for outcome in outcomes.values())
    assert not outcomes["off rival"].failed and outcomes["off backend"].failed


def test_nan_is_wrong():
    nan = torch.full((2,), float("nan"))
    assert harness.relative_error((nan,), (torch.ones(2),)) == float("inf")


def test_a_bound_is_timed_unchecked():
    bench = benchmark_of("linear_cross_entropy")
    case = dataclasses.replace(bench.cases(CPU, True)[0], direction=BOTH)
    bounds = tuple(v for v in bench.variants if v.kind == "bound")
    outcomes = race(bench, [case], bounds)[case].values()
    assert [outcome.row["relative_error"] for outcome in outcomes] == [None]
