# SPDX-License-Identifier: Apache-2.0
"""A call that looks like one that passed every check needs none; a call that does not is checked."""

from __future__ import annotations

import pytest
import torch

from cogview_kernels import _backends, _extension, layer_norm

pytestmark = pytest.mark.skipif(_extension.native is None, reason=_extension.missing_reason)


class Kind(torch.Tensor):
    pass


@pytest.fixture(autouse=True)
def passed(monkeypatch):
    monkeypatch.setattr(_backends, "_passed", {})
    return _backends._passed


def test_what_a_signature_tells_apart():
    x = torch.randn(2, 4)
    calls = [
        (x,),
        (x.double(),),
        (x.half(),),
        (x.bfloat16(),),
        (x.long(),),
        (x[:1],),
        (x.flatten(),),
        (x[None],),
        (x, None),
        (x, x),
        (None, x),
        *((x, value) for value in (1, 1.0, True, 0, 0.0, False, "1", "", -0.0, 1e-5)),
        (x, "1", ""),
        (x, "", "1"),
    ]
    signatures = [_backends.signature("op", *call) for call in calls]
    assert None not in signatures
    assert len(set(signatures)) == len(calls)
    assert _backends.signature("op", x) == _backends.signature("op", torch.nn.Parameter(torch.zeros(2, 4)))
    assert _backends.signature("op", x.t()) == _backends.signature("op", torch.zeros(4, 2))


@pytest.mark.parametrize(
    "argument",
    [
        [1],
        (1.0,),
        2**70,
        torch.float32,
        torch.empty(2, device="meta"),
        torch.ones(2).as_subclass(Kind),
        "\ud800",
    ],
)
def test_what_has_no_signature(argument):
    assert _backends.signature("op", torch.ones(2), argument) is None


def test_checks_run_once_for_each_signature(passed):
    x, weight = torch.randn(2, 4), torch.randn(4)
    layer_norm(x, weight, eps=1)
    before = dict(passed)
    assert torch.equal(layer_norm(-x, weight, eps=1), -layer_norm(x, weight, eps=1))
    assert passed == before and len(passed) == 1
    with pytest.raises(TypeError, match="eps must be a number, got bool"):
        layer_norm(x, weight, eps=True)
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\)"):
        layer_norm(x, weight[:3], eps=1)
    with pytest.raises(TypeError, match=r"weight must be torch\.float32"):
        layer_norm(x, weight.double(), eps=1)
    assert passed == before  # what failed is not remembered
    assert layer_norm(x, weight, eps=1, backend="reference").allclose(layer_norm(x, weight, eps=1))
    assert sorted(passed.values()) == ["cpu", "reference"]


def test_few_are_remembered(passed, monkeypatch):
    monkeypatch.setattr(_backends, "_MOST_PASSED", 3)
    for rows in range(1, 9):
        layer_norm(torch.randn(rows, 4))
    assert len(passed) <= 3
