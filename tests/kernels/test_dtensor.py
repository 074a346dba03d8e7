# SPDX-License-Identifier: Apache-2.0
"""A DTensor is refused with one error, whose way out works."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import local_map
from torch.testing._internal.distributed.fake_pg import FakeStore

from cogview_kernels import ThreeRegionLayout, layer_norm, three_region_attention

LAYOUT = ThreeRegionLayout(torch.tensor([[0]]), 2, 1)
# By rows, and by heads, with a layout that every rank has.
CALLS = {
    "layer_norm": (lambda x: layer_norm(x), (3, 8), [Shard(0)]),
    "three_region_attention": (lambda x: three_region_attention(x, x, x, LAYOUT), (1, 2, 6, 16), [Shard(1)]),
}


@pytest.fixture(scope="module")
def mesh():
    """Two ranks, of which this process is the first; nothing is sent."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_a_dtensor_is_refused_and_its_parts_are_not(op, requires_grad, mesh):
    call, shape, placements = CALLS[op]
    local = torch.randn(shape)
    x = DTensor.from_local(local, mesh, placements).requires_grad_(requires_grad)
    with pytest.raises(
        NotImplementedError, match=f"{op}: a DTensor has no sharding strategy here.*local_map"
    ):
        call(x)
    by_part = local_map(call, out_placements=placements, in_placements=(placements,), device_mesh=mesh)
    out = by_part(x)
    torch.testing.assert_close(out.to_local().detach(), call(local))
    if requires_grad:
        out.sum().backward()
        assert x.grad.to_local().shape == local.shape
