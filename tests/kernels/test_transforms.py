# SPDX-License-Identifier: Apache-2.0
"""Every op under every transform: the right derivative, or NotImplementedError, never a wrong number."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from cogview_kernels import (
    layer_norm,
    linear_cross_entropy,
    local_attention_2d,
    merge_attention,
    rms_norm,
    sandwich_layer_norm,
    sandwich_rms_norm,
    stable_softmax,
)

WEIGHT, BIAS = torch.linspace(0.5, 1.5, 8), torch.linspace(-1, 1, 8)
IDS, TARGET = torch.linspace(-1, 1, 40).view(5, 8), torch.tensor([4, -100, 1])


def cross_entropy(reduction, of_weight=False):
    def call(x, backend=None):
        hidden, weight = (IDS[:3], x.flatten().repeat(5)[:40].view(5, 8)) if of_weight else (x, IDS)
        target = TARGET if hidden.dim() == 2 else TARGET[0]
        return linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=backend)

    return call


def local_attention(x, backend=None):
    rows = x.reshape(1, 1, -1, 8)
    grid = (rows.shape[2], 1)
    out = local_attention_2d(
        rows, 2 * rows, rows, grid, (3, 1), extra_k=rows, extra_v=rows * rows, dropout_p=0.2, seed=3,
        backend=backend,
    )  # fmt: skip
    return out.reshape(x.shape)


def merged(x, backend=None):
    rows = x.reshape(1, 1, -1, 8)
    return merge_attention([rows, rows * rows], [rows[..., 0], rows.sum(-1)], backend=backend).reshape(
        x.shape
    )


# Each op as a function of one tensor, [3, 8] or a row of it, and the backend.
OPS = {
    "stable_softmax": lambda x, backend=None: stable_softmax(x, alpha=2.0, backend=backend),
    "layer_norm": lambda x, backend=None: layer_norm(x, WEIGHT, BIAS, backend=backend),
    "layer_norm of its weight": lambda x, backend=None: layer_norm(IDS, x.flatten()[:8], backend=backend),
    "sandwich_layer_norm": lambda x, backend=None: torch.cat(
        sandwich_layer_norm(x, 2 * x, WEIGHT, BIAS, None, BIAS, dropout_p=0.2, seed=3, backend=backend)
    ),
    "rms_norm": lambda x, backend=None: rms_norm(x, WEIGHT, backend=backend),
    "sandwich_rms_norm": lambda x, backend=None: torch.cat(
        sandwich_rms_norm(x, 2 * x, WEIGHT, BIAS, dropout_p=0.2, seed=3, backend=backend)
    ),
    "sandwich_rms_norm, one norm": lambda x, backend=None: sandwich_rms_norm(
        x, x * x, WEIGHT, backend=backend
    )[0],
    "local_attention_2d": local_attention,
    "merge_attention": merged,
    "linear_cross_entropy, mean": cross_entropy("mean"),
    "linear_cross_entropy, none": cross_entropy("none"),
    "linear_cross_entropy of its weight": cross_entropy("mean", of_weight=True),
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


@pytest.fixture
def x():
    return torch.randn(3, 8)


def loss(op, backend=None):
    return lambda x: op(x, backend).pow(2).sum()


def test_reverse_mode_under_torch_func(op, x):
    expected = grad(loss(op, "reference"))(x)
    torch.testing.assert_close(grad(loss(op))(x), expected)
    torch.testing.assert_close(vjp(loss(op), x)[1](torch.tensor(1.0))[0], expected)
    torch.testing.assert_close(jacrev(op)(x), jacrev(lambda x: op(x, "reference"))(x))
    torch.testing.assert_close(vmap(op)(x), vmap(lambda x: op(x, "reference"))(x))
    torch.testing.assert_close(vmap(grad(loss(op)))(x), vmap(grad(loss(op, "reference")))(x))


def test_batched_gradients(op, x):
    douts = torch.randn(2, *op(x).shape)
    ours, expected = (
        torch.autograd.grad(op(y, backend), y, douts, is_grads_batched=True)[0]
        for y, backend in ((x.clone().requires_grad_(), None), (x.clone().requires_grad_(), "reference"))
    )
    torch.testing.assert_close(ours, expected)


def test_vmap_over_nothing_is_refused(x):
    with pytest.raises(NotImplementedError, match="layer_norm: vmap must map 1 element or more, got 0"):
        vmap(OPS["layer_norm"])(x[:0])


@pytest.mark.parametrize("transform", [grad, lambda f: vmap(grad(f))], ids=["grad", "vmap of grad"])
def test_reverse_mode_of_an_op_called_by_its_name(transform, x):
    """So ``torch.compile`` calls it: ``torch.compile(torch.func.grad(f))`` is traced to this."""
    by_name = lambda x: torch.ops.cogview_kernels.layer_norm(x, WEIGHT, BIAS, 1e-5, "row", "cpu")[0]  # noqa: E731
    ours = transform(lambda x: by_name(x).pow(2).sum())(x)
    expected = transform(loss(OPS["layer_norm"], "reference"))(x)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(vmap(by_name)(x), OPS["layer_norm"](x))
    compiled = torch.compile(transform(loss(OPS["layer_norm"])), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
        lambda f, x: jacfwd(f)(x),
        lambda f, x: hessian(f)(x),
        lambda f, x: grad(lambda x: grad(f)(x).sum())(x),
        lambda f, x: jacrev(jacrev(f))(x),
        lambda f, x: torch.autograd.functional.hessian(f, x),
    ],
    ids=["jvp", "jacfwd", "hessian", "grad of grad", "jacrev of jacrev", "functional.hessian"],
)
def test_what_kernels_have_not_is_refused(op, x, transform):
    with pytest.raises(NotImplementedError, match="use backend='reference'"):
        transform(loss(op), x)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_tensors_are_refused(op, x, requires_grad):
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        op(forward_ad.make_dual(x.requires_grad_(requires_grad), torch.ones_like(x)))


def test_second_derivatives_are_refused_and_only_those(op, x):
    x.requires_grad_()
    (first,) = torch.autograd.grad(loss(op)(x), x, create_graph=True)
    torch.testing.assert_close(first.detach(), grad(loss(op, "reference"))(x.detach()))
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        (first.pow(2).sum() + x.sum()).backward()
