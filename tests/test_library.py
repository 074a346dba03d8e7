# SPDX-License-Identifier: Apache-2.0
"""How ops are registered."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from cogview_kernels import _extension, layer_norm, linear_cross_entropy
from cogview_kernels._torch_ops import Op
from cogview_kernels.layer_norm.op import layer_norm_op


class OnSecondGPU(torch.Tensor):
    device = torch.device("cuda", 1)
    is_cuda = True

    def get_device(self):
        return 1


@pytest.mark.parametrize(("current", "entered"), [(0, [1]), (1, [])])
def test_an_op_runs_on_the_device_of_its_first_tensor(current, entered, monkeypatch):
    inside = []

    @contextlib.contextmanager
    def device(which):
        inside.append(which.index)
        yield
        inside.clear()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    op = Op.__new__(Op)
    op.kernel = lambda *arguments: (len(arguments), list(inside))
    assert op._on_its_device(None, torch.ones(2).as_subclass(OnSecondGPU), 0.5) == (3, entered)
    assert op._on_its_device(torch.ones(2)) == (1, [])


OP = "cogview_kernels::layer_norm"


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def dispatch_mode(x):
    with Seen() as mode:
        layer_norm(x, None, None)
    return OP in mode.names


def profiler(x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer_norm(x, None, None)
    return OP in {event.key for event in profile.key_averages()}


def fake_tensor(x):
    with torch._subclasses.FakeTensorMode():
        return layer_norm(torch.empty(3, 8), None, None).shape == (3, 8)


def negative_view(x):
    """Its memory holds the negated values."""
    negative = torch.complex(x, x.detach()).conj().imag
    assert negative.is_neg()
    return torch.allclose(layer_norm(negative, None, None), layer_norm(negative.resolve_neg(), None, None))


def zero_tensor(x):
    return not layer_norm(torch._efficientzerotensor(3, 8), None, None).any()


def vmap(x):
    x = x.detach()
    rows = torch.func.vmap(lambda row: layer_norm(row, None, None))(x)
    return torch.allclose(rows, layer_norm(x, None, None))


def tracer(x):
    traced = torch.jit.trace(lambda x: layer_norm(x, None, None), (x.detach(),), check_trace=False)
    return OP in str(traced.graph)


def forward_mode(x):
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        layer_norm(forward_ad.make_dual(x, torch.ones_like(x)), None, None)
    return True


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    "watcher", [dispatch_mode, profiler, fake_tensor, negative_view, zero_tensor, vmap, tracer, forward_mode]
)
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore:Converting a tensor")
def test_who_watches_sees_the_op(watcher, gradient):
    x = torch.randn(3, 8, requires_grad=gradient)
    layer_norm(x, None, None)  # its signature has passed, so that the next one may go the shortest way
    assert watcher(x)


def test_unwatched_nobody_pays_for_the_dispatcher(monkeypatch):
    called = []
    monkeypatch.setattr(layer_norm_op, "_ready", {})
    kernel, overload = layer_norm_op._unsaved, layer_norm_op._overload
    monkeypatch.setattr(layer_norm_op, "_unsaved", lambda *a: called.append("kernel") or kernel(*a))
    monkeypatch.setattr(layer_norm_op, "_overload", lambda *a: called.append("overload") or overload(*a))
    layer_norm(torch.randn(3, 8), None, None)
    assert called == ["kernel"]
    layer_norm(torch.randn(3, 8), None, None)  # by a shorter way still
    assert "overload" not in called


@pytest.mark.skipif(_extension.native is None, reason=_extension.missing_reason)
def test_a_signature_of_plain_memory_leads_to_the_kernel(monkeypatch):
    monkeypatch.setattr(layer_norm_op, "_route", None)
    x = torch.randn(3, 8)
    assert layer_norm(x, None, None).shape == (3, 8)
    assert layer_norm(x, torch.ones(8, requires_grad=True)).requires_grad
    with pytest.raises(TypeError, match="not callable"):
        layer_norm(torch._neg_view(x), None, None)


def test_symbolic_sizes_among_the_arguments_are_traced():
    """The number of ids is one, where a tracer keeps sizes as symbols."""
    inputs = torch.randn(6, 8), torch.randn(11, 8), torch.randint(0, 11, (6,))
    call = lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target)  # noqa: E731
    traced = make_fx(call, tracing_mode="symbolic")(*inputs)
    assert "cogview_kernels.linear_cross_entropy" in traced.code
    torch.testing.assert_close(traced(*inputs), linear_cross_entropy(*inputs))
