# SPDX-License-Identifier: Apache-2.0
"""PyTorch's FLOP counter counts our ops: the pairs that are seen, forward and backward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.functional import cross_entropy, linear
from torch.utils.flop_counter import FlopCounterMode

from cogview_kernels import (
    ThreeRegionLayout,
    decode_attention,
    decode_linear,
    decode_step,
    linear_cross_entropy,
    local_attention_2d,
    three_region_attention,
)
from cogview_kernels.local_attention_2d.window import Window
from tests.helpers.stack import random_stack

B, H, T, D = 2, 4, 23, 16


def flops(call):
    with FlopCounterMode(display=False) as counter:
        out = call()
        forward = counter.get_total_flops()
        if out.requires_grad:
            out.pow(2).sum().backward()
    return forward, counter.get_total_flops() - forward


def heads(length=T, count=H, requires_grad=True):
    return torch.randn(B, count, length, D, requires_grad=requires_grad)


@pytest.mark.parametrize("frozen", ["", "q", "k", "v", "qk", "kv"])
def test_three_region_attention_counts_visible_pairs(frozen):
    q, k, v = heads(), heads(count=2), heads(count=2)
    for name, x in (("q", q), ("k", k), ("v", v)):
        x.requires_grad_(name not in frozen)
    layout = ThreeRegionLayout(torch.tensor([[0, 1, 9, 14], [22, -1, 7, 11]]), 4, 2)
    one = 2 * H * D * int(layout.dense_mask(T).sum())
    products = 1 + ("q" not in frozen or "k" not in frozen) + sum(name not in frozen for name in "qkv")
    assert flops(lambda: three_region_attention(q, k, v, layout)) == (2 * one, products * one)


def test_without_values_pivots_are_taken_to_lie_evenly():
    layout = ThreeRegionLayout(torch.arange(40)[None], 4, 2)
    everywhere = layout.pairs(40, layout.pivots.tolist())
    assert layout.pairs(40, None) == everywhere
    with FakeTensorMode():
        q = torch.empty(1, H, 40, D, requires_grad=True)
        fake = ThreeRegionLayout(torch.arange(40)[None], 4, 2)
        assert flops(lambda: three_region_attention(q, q, q, fake))[0] == 4 * H * D * everywhere


@pytest.mark.parametrize("with_layout", [False, True])
def test_decode_attention_counts_what_the_lengths_say(with_layout):
    lengths, queries = torch.tensor([T, 2]), 3
    layout = ThreeRegionLayout(torch.tensor([[0, 1, 9, 14], [20, -1, 7, 11]]), 4, 2) if with_layout else None
    seen = torch.ones(B, T, T, dtype=torch.bool).tril() if layout is None else layout.dense_mask(T)
    pairs = int(seen[0, T - queries :].sum() + seen[1, :2].sum())
    q, k, v = heads(queries, requires_grad=False), heads(requires_grad=False), heads(requires_grad=False)
    counted = flops(lambda: decode_attention(q, k, v, lengths, layout=layout))
    assert counted == (4 * H * D * pairs, 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [(5, 4), (1, 1), (2, 7)])
def test_local_attention_counts_windows_cut_at_the_border(grid, causal):
    window = Window(*grid, 5, 3, 2, causal)
    assert window.pairs == int(window.dense_mask(torch.device("cpu")).sum())
    mask = torch.tensor([[True, False, True], [True, True, True]])
    q, k, v, extra = (heads(n) for n in (window.queries, window.keys, window.keys, 3))
    counted = flops(
        lambda: local_attention_2d(
            q, k, v, grid, (5, 3), query_scale=2, causal=causal, extra_k=extra, extra_v=extra, extra_mask=mask
        )
    )
    one = 2 * H * D * (B * window.pairs + 5 * window.queries)
    assert counted == (2 * one, 5 * one)


def test_decode_linear_counts_what_pytorch_does():
    x, weight, bias = torch.randn(3, 8), torch.randn(11, 8), torch.randn(11)
    ours, eager = flops(lambda: decode_linear(x, weight, bias)), flops(lambda: linear(x, weight, bias))
    assert ours == eager == (2 * 3 * 8 * 11, 0)


@pytest.mark.parametrize("with_layout", [False, True])
def test_decode_step_counts_its_layers(with_layout):
    stack, lengths = random_stack(layers=2, C=H * D, F=24), torch.tensor([T - 3, 2])
    layout = ThreeRegionLayout(torch.tensor([[0, 1, 9, 14], [20, -1, 7, 11]]), 4, 2) if with_layout else None
    seen = torch.ones(B, T, T, dtype=torch.bool).tril() if layout is None else layout.dense_mask(T)
    pairs = int(seen[0, T - 3 :].sum() + seen[1, 2:5].sum())
    x, cache = torch.randn(B, 3, H * D), torch.zeros(2, 2, B, H, T, D)
    products = 2 * B * 3 * (4 * (H * D) ** 2 + 2 * H * D * 24) + 4 * H * D * pairs
    head = torch.randn(7, H * D)
    counted = flops(lambda: decode_step(x, stack, cache, lengths, layout=layout, head=head))
    assert counted == (2 * products + 2 * B * 3 * 7 * H * D, 0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_counts_what_pytorch_does(reduction):
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    target = torch.randint(0, 11, (9,))
    ours = flops(lambda: linear_cross_entropy(hidden, weight, target, reduction=reduction))
    eager = flops(lambda: cross_entropy(hidden @ weight.T, target, reduction=reduction))
    again = eager[0] if reduction == "none" else 0  # logits that are made anew
    assert sum(ours) == sum(eager) + again
    with torch.no_grad():
        assert flops(lambda: linear_cross_entropy(hidden, weight, target))[0] == eager[0]


def test_the_counter_may_be_imported_first():
    """Here it is imported last."""
    code = (
        "import torch, torch.utils.flop_counter, cogview_kernels\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "x = torch.randn(3, 8)\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    cogview_kernels.linear_cross_entropy(x, x, torch.arange(3))\n"
        "assert counter.get_total_flops() == 2 * 3 * 3 * 8, counter.get_total_flops()"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
