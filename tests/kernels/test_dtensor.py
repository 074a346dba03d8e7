# SPDX-License-Identifier: Apache-2.0
"""DTensors: parts that need no other part are computed where they lie; the rest is refused, with a way out.

What two ranks compute is in ``ranks.py``, all of it in one start of the ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import local_map
from torch.testing._internal.distributed.fake_pg import FakeStore

import cogview_kernels as ck
from cogview_kernels import ThreeRegionLayout
from tests.kernels.ranks import calls

ROOT = Path(__file__).parents[2]
LAYOUT = ThreeRegionLayout(torch.tensor([[0], [2]]), 2, 1)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What is wrong with each call, on each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.ranks", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", calls())
def test_two_ranks_compute_what_one_does(reports, name):
    assert [report[name] for report in reports] == ["", ""]


@pytest.fixture(scope="module")
def mesh():
    """Two ranks, of which this process is the first; nothing is sent."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.fixture
def part(mesh):
    """``part(placement, *shape)``: a DTensor of which this rank has a part of that shape."""
    return lambda placement, *shape: DTensor.from_local(torch.randn(shape), mesh, [placement])


def attention(q, k, **options):
    return ck.three_region_attention(q, k, k, LAYOUT, **options)


REFUSED = {
    "sequence": (
        lambda part: attention(part(Shard(2), 2, 4, 3, 8), part(Shard(2), 2, 4, 3, 8)),
        NotImplementedError,
        r"q must be placed as one of Shard\(0\), Shard\(1\), Replicate\(\).*Shard\(dim=2\).*local_map",
    ),
    "sum": (
        lambda part: ck.layer_norm(part(Partial(), 3, 8)),
        NotImplementedError,
        "layer_norm: x must be placed as one of .*redistribute it",
    ),
    "columns": (
        lambda part: ck.rms_norm(part(Shard(1), 3, 8)),
        NotImplementedError,
        "rms_norm: x must be placed as one of",
    ),
    "rows of a causal softmax": (
        lambda part: ck.stable_softmax(part(Shard(1), 2, 3, 8), causal=True),
        NotImplementedError,
        r"scores must be placed as one of Shard\(0\), Replicate\(\)",
    ),
    "otherwise": (
        lambda part: attention(part(Shard(0), 1, 4, 6, 8), part(Shard(1), 2, 2, 6, 8)),
        ValueError,
        "k must be placed as .*to go with q, got .*redistribute it",
    ),
    "one key head": (
        lambda part: attention(part(Shard(1), 2, 2, 6, 8), part(Replicate(), 2, 1, 6, 8)),
        NotImplementedError,
        "q and k must have a multiple of 2 there, got 4 and 1",
    ),
    "dropout": (
        lambda part: attention(part(Shard(0), 1, 4, 6, 8), part(Shard(0), 1, 4, 6, 8), dropout_p=0.1, seed=3),
        NotImplementedError,
        "dropout_p must be 0 where q is a DTensor.*got 0.1",
    ),
    "dropout of a norm": (
        lambda part: ck.sandwich_rms_norm(*[part(Shard(0), 3, 8)] * 2, None, None, dropout_p=0.1),
        NotImplementedError,
        "dropout_p must be 0 where branch is a DTensor",
    ),
    "one maximum": (
        lambda part: ck.layer_norm(part(Shard(0), 3, 8), pb_relax="tensor"),
        NotImplementedError,
        "pb_relax='tensor' takes the maximum over all ranks' parts of x; use 'row'",
    ),
    "a gradient that would be lost": (
        lambda part: ck.rms_norm(part(Shard(0), 3, 8), torch.ones(8, requires_grad=True)),
        TypeError,
        "weight must be a DTensor to have a gradient, as x is",
    ),
    "no leader": (
        lambda part: ck.rms_norm(torch.ones(3, 8), part(Replicate(), 8)),
        NotImplementedError,
        "rms_norm: a DTensor has no sharding strategy here.*local_map",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_other_parts_is_refused(part, case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(part)


def test_the_way_out_works(mesh):
    """Inside ``local_map`` an op sees plain tensors; ``backend="reference"`` leaves DTensors to PyTorch."""
    local = torch.randn(3, 8)
    x = DTensor.from_local(local, mesh, [Shard(0)]).requires_grad_()
    by_part = local_map(
        lambda x: ck.layer_norm(x, pb_relax="tensor"),
        out_placements=[Shard(0)],
        in_placements=([Shard(0)],),
        device_mesh=mesh,
    )
    out = by_part(x)
    torch.testing.assert_close(out.to_local().detach(), ck.layer_norm(local, pb_relax="tensor"))
    out.sum().backward()
    assert x.grad.to_local().shape == local.shape
    assert ck.rms_norm(x.detach(), backend="reference").placements == (Shard(0),)
    with torch.no_grad():
        assert ck.rms_norm(x, torch.ones(8, requires_grad=True)).placements == (Shard(0),)
