# SPDX-License-Identifier: Apache-2.0
"""Whatever is to be True or False is asked for in one way: nothing else is taken for it, as in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cogview_kernels import (
    ThreeRegionLayout,
    linear_cross_entropy,
    local_attention_2d,
    merge_attention,
    rms_norm,
    sandwich_rms_norm,
    stable_softmax,
    three_region_attention,
)
from cogview_kernels.modules import SandwichRMSNorm

ROW, HEAD, MASK = torch.randn(2, 4), torch.randn(1, 1, 4, 8), torch.zeros(1, 4, dtype=torch.bool)
LOSS = (ROW, torch.randn(3, 4), torch.tensor([0, 2]))

# The function, the argument, and a call with it.
CASES = [
    ("stable_softmax", "causal", lambda b: stable_softmax(ROW, causal=b)),
    (
        "three_region_attention",
        "return_lse",
        lambda b: three_region_attention(*[HEAD] * 3, None, return_lse=b),
    ),
    (
        "local_attention_2d",
        "causal",
        lambda b: local_attention_2d(*[HEAD] * 3, (2, 2), (3, 3), causal=b),
    ),
    (
        "local_attention_2d",
        "return_lse",
        lambda b: local_attention_2d(*[HEAD] * 3, (2, 2), (3, 3), return_lse=b),
    ),
    ("merge_attention", "return_lse", lambda b: merge_attention([HEAD], [HEAD[..., 0]], return_lse=b)),
    ("rms_norm", "round_before_weight", lambda b: rms_norm(ROW, round_before_weight=b)),
    (
        "sandwich_rms_norm",
        "round_before_weight",
        lambda b: sandwich_rms_norm(ROW, ROW, None, round_before_weight=b),
    ),
    ("SandwichRMSNorm", "round_before_weight", lambda b: SandwichRMSNorm(4, round_before_weight=b)),
    ("linear_cross_entropy", "return_losses", lambda b: linear_cross_entropy(*LOSS, return_losses=b)),
    (
        "linear_cross_entropy",
        "return_predicted_tokens",
        lambda b: linear_cross_entropy(*LOSS, return_predicted_tokens=b),
    ),
    ("ThreeRegionLayout", "causal", lambda b: ThreeRegionLayout(MASK.long(), causal=b)),
    ("ThreeRegionLayout", "causal", lambda b: ThreeRegionLayout.sample(MASK, 2, causal=b)),
    (
        "ThreeRegionLayout.sample",
        "density_correction",
        lambda b: ThreeRegionLayout.sample(MASK, 2, density_correction=b),
    ),
]
OTHERS = [
    (1, "int"),
    (0, "int"),
    ("no", "str"),
    (None, "NoneType"),
    (np.True_, r"numpy\.bool_?"),  # by the name of its type alone it would be a bool
    (torch.tensor(True), r"torch\.Tensor"),
]


@pytest.mark.parametrize(("op", "name", "call"), CASES, ids=lambda value: value if type(value) is str else "")
def test_true_and_false_alone_are_taken(op, name, call):
    for value, kind in OTHERS:
        for _ in range(2):
            with pytest.raises(TypeError, match=f"^{op}: {name} must be a bool, True or False, got {kind}$"):
                call(value)
    call(True)
    call(False)


@pytest.mark.parametrize(("op", "name", "call"), CASES, ids=lambda value: value if type(value) is str else "")
def test_it_is_traced_without_a_graph_break(op, name, call):
    def function(x):
        call(True)
        return x + 1

    if op != "SandwichRMSNorm":  # parameters are made outside of compiled code
        torch.testing.assert_close(torch.compile(function, backend="eager", fullgraph=True)(ROW), ROW + 1)
    torch._dynamo.reset()
