# SPDX-License-Identifier: Apache-2.0
"""The plan of headlines names what the benchmarks have."""

from __future__ import annotations

import pytest
import torch

from benchmarks import headlines
from benchmarks.definitions import benchmark_of


@pytest.mark.parametrize("wanted", headlines.PLAN, ids=lambda wanted: f"{wanted.op}-{wanted.shape}")
def test_every_planned_race_exists(wanted):
    bench = benchmark_of(wanted.op)
    every = bench.cases(torch.device("cuda"), False)
    directions = {c.direction for c in every if c.shape.name == wanted.shape and c.dtype == torch.bfloat16}
    assert directions >= set(wanted.directions)
    assert {v.name for v in bench.variants} >= set(headlines.with_rivals(wanted).variants)


def test_rivals_belong_to_the_plan():
    assert headlines.RIVALS.keys() <= {(wanted.op, wanted.shape) for wanted in headlines.PLAN}
