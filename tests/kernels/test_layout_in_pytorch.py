# SPDX-License-Identifier: Apache-2.0
"""ThreeRegionLayout where PyTorch carries it: pytrees, export, files, devices, fake tensors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree

from cogview_kernels import (
    ThreeRegionLayout,
    decode_attention,
    decode_step,
    linear_cross_entropy,
    three_region_attention,
)
from tests.helpers.stack import random_stack

LAYOUT = ThreeRegionLayout(torch.tensor([[1, 5, -1], [0, 3, 9]]), 4, 2, 0.5, 3)
BOTH_SIDES = ThreeRegionLayout(LAYOUT.pivots, 4, 2, 0.5, 3, causal=False)


def assert_same(found, expected=LAYOUT):
    assert type(found) is ThreeRegionLayout and torch.equal(found.pivots, expected.pivots)
    for name in ("block_size", "window_blocks", "pivot_bias", "density", "causal"):
        assert getattr(found, name) == getattr(expected, name)


def through_a_file(layout, weights_only):
    file = io.BytesIO()
    torch.save({"layout": layout}, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)["layout"]


@pytest.mark.parametrize(
    "way",
    [
        copy.copy,
        copy.deepcopy,
        lambda layout: pickle.loads(pickle.dumps(layout)),
        lambda layout: through_a_file(layout, True),
        lambda layout: through_a_file(layout, False),
        lambda layout: _pytree.tree_map(torch.clone, layout),
    ],
    ids=["copy", "deepcopy", "pickle", "weights_only", "torch.save", "tree_map"],
)
def test_a_layout_comes_back_as_it_was(way):
    assert_same(way(LAYOUT))
    assert_same(way(BOTH_SIDES), BOTH_SIDES)


def test_a_file_cannot_hold_what_the_constructor_refuses():
    """Kernels divide by the block size."""
    forged = copy.deepcopy(LAYOUT)
    forged.__dict__["block_size"] = 0
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        through_a_file(forged, True)


def test_as_a_pytree_its_tensor_is_the_leaf():
    leaves, spec = _pytree.tree_flatten({"a": [LAYOUT]})
    assert len(leaves) == 1 and leaves[0] is LAYOUT.pivots
    assert_same(_pytree.tree_unflatten(leaves, spec)["a"][0])
    ((path, _),) = _pytree.tree_flatten_with_path(LAYOUT)[0]
    assert _pytree.keystr(path) == ".pivots"
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec


def test_to_moves_the_pivots():
    assert LAYOUT.to("cpu") is LAYOUT
    moved = LAYOUT.to("meta", non_blocking=True)
    assert moved.pivots.device.type == "meta"
    assert (moved.block_size, moved.pivot_bias, moved.density) == (4, 0.5, 3)


@pytest.mark.parametrize("backend", [None, "sdpa", "reference"])
def test_the_density_is_a_bias(backend):
    q, k, v = (torch.randn(2, 2, 20, 16) for _ in range(3))
    plain = ThreeRegionLayout(LAYOUT.pivots, 4, 2, 0.5 + torch.tensor(3.0).log().item())
    out, expected = (three_region_attention(q, k, v, x, backend=backend) for x in (LAYOUT, plain))
    torch.testing.assert_close(out, expected)
    cache = q[:, :, -1:], k, v, torch.tensor([20, 17])
    stack, caches = random_stack(C=32), torch.randn(2, 2, 2, 2, 20, 16)
    step = torch.randn(2, 1, 32), stack, caches, torch.tensor([19, 16])
    for _ in range(2):  # the second time from memory
        out, expected = (decode_attention(*cache, layout=x, backend=backend) for x in (LAYOUT, plain))
        torch.testing.assert_close(out, expected)
        if backend != "sdpa":
            out, expected = (decode_step(*step, layout=x, backend=backend) for x in (LAYOUT, plain))
            torch.testing.assert_close(out, expected)


class Attention(torch.nn.Module):
    def forward(self, q, k, v, layout):
        return three_region_attention(q, k, v, layout)


class Drawn(torch.nn.Module):
    def forward(self, q, text):
        layout = ThreeRegionLayout.sample(text, 4, block_size=4, window_blocks=2)
        return three_region_attention(q, q, q, layout).shape, layout.pivots


@pytest.mark.parametrize("strict", [False, True])
def test_a_layout_is_an_input_of_an_exported_model(strict):
    arguments = *(torch.randn(2, 2, 20, 16) for _ in range(3)), LAYOUT
    T = torch.export.Dim("T", min=12, max=100)
    shapes = ({2: T}, {2: T}, {2: T}, [None])
    program = torch.export.export(Attention(), arguments, dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    q, k, v = (torch.randn(2, 2, 31, 16) for _ in range(3))
    torch.testing.assert_close(module(q, k, v, LAYOUT), three_region_attention(q, k, v, LAYOUT))


def test_a_layout_is_drawn_in_an_exported_model():
    T = torch.export.Dim("T", min=12, max=100)
    q, text = torch.randn(2, 2, 20, 16), torch.zeros(2, 20, dtype=torch.bool)
    program = torch.export.export(Drawn(), (q, text), dynamic_shapes=({2: T}, {1: T}))
    shape, pivots = program.module()(torch.randn(2, 2, 31, 16), torch.zeros(2, 31, dtype=torch.bool))
    assert tuple(shape) == (2, 2, 31, 16) and pivots.shape == (2, 4)


def test_fake_tensors_have_no_values_to_check():
    with FakeTensorMode():
        text = torch.zeros(2, 20, dtype=torch.bool)
        layout = ThreeRegionLayout.sample(text, 4, block_size=4, window_blocks=2)
        q = torch.empty(2, 2, 20, 16)
        assert three_region_attention(q, q, q, layout).shape == q.shape
        lengths = torch.tensor([3, 20])
        for given in (None, layout):
            assert decode_attention(q[:, :, :1], q, q, lengths, layout=given).shape == (2, 2, 1, 16)
        loss = linear_cross_entropy(torch.empty(3, 8), torch.empty(5, 8), torch.zeros(3, dtype=torch.int64))
        assert loss.shape == ()
