# SPDX-License-Identifier: Apache-2.0
"""A call that looks like one that passed every check needs none; a call that does not is checked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cogview_kernels import (
    _backends,
    _extension,
    layer_norm,
    rms_norm,
    sandwich_layer_norm,
    sandwich_rms_norm,
    three_region_attention,
)
from cogview_kernels.layer_norm.op import layer_norm_op
from cogview_kernels.rms_norm.op import rms_norm_op

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
        (torch.randn(4, 2).t(),),
        (x.clone().requires_grad_(),),
        (x[None],),
        (x, None),
        (x, x),
        (None, x),
        *((x, value) for value in (1, 1.0, True, 0, 0.0, False, "1", "", -0.0, 1e-5)),
        *((x, dtype) for dtype in (torch.float32, torch.bfloat16)),
        (x, "1", ""),
        (x, "", "1"),
    ]
    signatures = [_backends.signature("op", *call) for call in calls]
    assert None not in signatures
    assert len(set(signatures)) == len(calls)
    with torch.no_grad():
        parameter = _backends.signature("op", torch.nn.Parameter(torch.zeros(2, 4)))
    assert _backends.signature("op", x) == parameter
    assert _backends.signature("op", x[1:]) == _backends.signature("op", torch.zeros(1, 4))


def test_which_signatures_lead_to_the_kernel_at_once():
    x, weight = torch.randn(2, 4), torch.ones(4, requires_grad=True)
    negative = torch.complex(x, x).conj().imag
    assert negative.is_neg()

    def direct(*given):
        return _backends.is_direct(_backends.signature("op", *given))

    assert direct(x, None, 1.0) and direct(x, x.t(), "1")
    assert not any(direct(x, other) for other in (weight, negative, torch._efficientzerotensor(2, 4), [1]))
    with torch.no_grad():
        assert direct(x, weight)
    with torch.inference_mode():
        assert direct(torch.ones(2), weight)


@pytest.mark.parametrize(
    "argument",
    [
        [1],
        (1.0,),
        2**70,
        torch.strided,
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


@pytest.mark.parametrize("sandwich", [sandwich_layer_norm, sandwich_rms_norm])
def test_a_dtype_is_told_apart(sandwich, passed):
    branch, residual, weight = torch.randn(2, 4).bfloat16(), torch.randn(2, 4), torch.randn(4)
    parameters = [weight] * (4 if sandwich is sandwich_layer_norm else 2)
    for _ in range(2):
        for dtype in (None, torch.float32, torch.bfloat16):
            _, normed = sandwich(branch, residual, *parameters, normed_dtype=dtype)
            assert normed.dtype == (dtype or torch.float32)
        with pytest.raises(TypeError, match=r"normed_dtype must be .* got torch\.float16"):
            sandwich(branch, residual, *parameters, normed_dtype=torch.float16)
    assert len(passed) == 3


ROW, HEAD = torch.randn(2, 4), torch.randn(1, 1, 3, 4)
DROPPING = {
    "sandwich_layer_norm": (sandwich_layer_norm, (ROW, ROW, None, None, None, None)),
    "sandwich_rms_norm": (sandwich_rms_norm, (ROW, ROW, None)),
    "three_region_attention": (three_region_attention, (HEAD, HEAD, HEAD, None)),
}


@pytest.mark.parametrize("name", DROPPING)
def test_a_new_seed_is_not_checked_anew(name, passed):
    function, arguments = DROPPING[name]

    def call(seed):
        return function(*arguments, dropout_p=0.5, seed=seed, backend="cpu")

    found = [call(seed) for seed in (*range(30), -(2**63), 2**63 - 1, 2**64 - 1)]
    assert len(passed) == 1
    first = [out[0] if isinstance(out, tuple) else out for out in found]
    assert len({tuple(out.flatten().tolist()) for out in first}) > 20
    for seed, kind in (
        (2**64, ValueError),
        (-(2**63) - 1, ValueError),
        (2**70, ValueError),
        (True, TypeError),
        (3.7, TypeError),
        ("0", TypeError),
    ):
        with pytest.raises(kind, match=f"^{name}: seed must"):
            call(seed)
    call(torch.tensor(5))
    with pytest.raises(TypeError, match="seed must be an int or a 0-d int64 tensor"):
        call(torch.tensor(5.0))
    assert len(passed) == 2  # a tensor is known by its dtype and shape


def test_few_are_remembered(passed, monkeypatch):
    monkeypatch.setattr(_backends, "_MOST_KEPT", 3)
    for rows in range(1, 9):
        layer_norm(torch.randn(rows, 4))
    assert len(passed) <= 3


class Seen(TorchDispatchMode):
    """The names of the ops that the dispatcher is asked for inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize(("norm", "op"), [(layer_norm, layer_norm_op), (rms_norm, rms_norm_op)])
def test_a_second_call_goes_straight_to_the_kernel(norm, op, with_weight, monkeypatch):
    monkeypatch.setattr(op, "_ready", {})
    weight = torch.randn(40) if with_weight else None
    norm(torch.randn(3, 40), weight, eps=0.5)
    with Seen() as seen:  # somebody watches, so that the dispatcher is asked
        norm(torch.randn(3, 40), weight, eps=0.5)
    assert f"cogview_kernels.{op.name}.default" in seen.names
    strided = torch.randn(40, 3).t()
    for x in (strided, strided, strided[:0], strided[:0]):
        torch.testing.assert_close(norm(x, weight), norm(x, weight, backend="reference"))
    monkeypatch.setattr(op, "for_signature", None)
    x = torch.randn(3, 40)
    found = norm(x, weight, eps=0.5)
    assert found.is_contiguous()
    torch.testing.assert_close(found, norm(x, weight, eps=0.5, backend="reference"))
    for other in (strided, x[:0], x[:2]):
        with pytest.raises(TypeError, match="NoneType"):  # the other way, which is not there
            norm(other, weight, eps=0.5)
    with pytest.raises(TypeError, match="NoneType"):
        norm(x, weight, eps=0.25)


def test_tensors_of_older_pytorch_are_read_by_their_attributes():
    """Before 2.10 it has no exchange API, of which the extension asks once in a process."""
    code = (
        "import torch\n"
        "if hasattr(torch.Tensor, '__dlpack_c_exchange_api__'):\n"
        "    del torch.Tensor.__dlpack_c_exchange_api__\n"
        "from cogview_kernels import ThreeRegionLayout, _backends, decode_attention, layer_norm\n"
        "assert _backends.signature('op', torch.ones(2)) is None\n"
        "for dtype in (torch.float32, torch.float16, torch.bfloat16):\n"
        "    x, weight = torch.randn(3, 2, 8).to(dtype), torch.randn(8)\n"
        "    ours, plain = (layer_norm(x, weight, backend=b) for b in ('cpu', 'reference'))\n"
        "    torch.testing.assert_close(ours, plain)\n"
        "    q = torch.randn(2, 1, 3, 16).to(dtype).transpose(1, 2)\n"
        "    k, v = (torch.randn(2, 9, 3, 16).to(dtype).transpose(1, 2) for _ in range(2))\n"
        "    for integers in (torch.int32, torch.int64):\n"
        "        layout = ThreeRegionLayout(torch.tensor([[0, 3], [1, -1]], dtype=integers), 2, 2)\n"
        "        call = (q, k, v, torch.tensor([9, 5], dtype=integers))\n"
        "        ours = decode_attention(*call, layout=layout, backend='cpu')\n"
        "        plain = decode_attention(*call, layout=layout, backend='reference')\n"
        "        torch.testing.assert_close(ours, plain)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
