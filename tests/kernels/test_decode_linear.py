# SPDX-License-Identifier: Apache-2.0
"""decode_linear: the kernel against plain PyTorch, which is its reference, and which way a call takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogview_kernels import _backends, decode_linear
from cogview_kernels.decode_linear import native
from cogview_kernels.decode_linear.op import decode_linear_op
from cogview_kernels.decode_linear.reference import decode_linear_reference
from tests.helpers.tolerance import assert_within_budget, judge

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(N=1, K=96, O=40, dtype=torch.float32):
    x, weight, bias = torch.randn(N, K), torch.randn(O, K), 3 * torch.randn(O)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def check(x, weight, bias, activation):
    out = decode_linear(x, weight, bias, activation=activation, backend="cpu")
    truth, eager = judge(lambda *t: [decode_linear_reference(*t, activation)], [x, weight, bias])
    assert_within_budget(out, eager[0], truth[0], dtype=x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("N", [1, 2, 5])
def test_error_budget(dtype, activation, N, backend_device):
    backend_device("cpu")
    check(*make(N, 1100, 45, dtype), activation)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, instruction_set):
    instruction_set(isa)
    for dtype in DTYPES:
        check(*make(3, 1100, 45, dtype), "gelu_tanh")


@pytest.mark.parametrize("K", [1, 3, 7, 8, 9, 16, 17, 33, 511, 512, 513, 1024, 1030])
@pytest.mark.parametrize("O", [1, 3, 4, 5, 8, 13])
def test_edges_of_vectors_and_runs(K, O, backend_device):
    backend_device("cpu")
    for N in (1, 3):
        x, weight, bias = make(N, K, O)
        torch.testing.assert_close(
            decode_linear(x, weight, bias, backend="cpu"), F.linear(x, weight, bias), atol=1e-4, rtol=1e-4
        )


def test_several_chunks(backend_device):
    """More outputs than a chunk has, on several threads; the last chunk is a part."""
    backend_device("cpu")
    x, weight, bias = make(2, 40, 5003)
    truth = F.linear(x.double(), weight.double(), bias.double()).float()
    torch.testing.assert_close(decode_linear(x, weight, bias, backend="cpu"), truth, atol=1e-4, rtol=1e-4)


def test_a_row_does_not_depend_on_the_others(backend_device):
    backend_device("cpu")
    x, weight, bias = make(native.MOST_ROWS, 70, 37)
    together = decode_linear(x, weight, bias, activation="gelu_tanh", backend="cpu")
    alone = [decode_linear(row, weight, bias, activation="gelu_tanh", backend="cpu") for row in x]
    assert torch.equal(together, torch.stack(alone))


def test_strides_and_nothing(backend_device):
    backend_device("cpu")
    x, weight, bias = (
        torch.randn(48, 2, 2).permute(1, 2, 0),
        torch.randn(40, 60)[3:, 5:53],
        torch.randn(74)[::2],
    )
    for w in (weight, torch.randn(48, 37).t()):
        torch.testing.assert_close(decode_linear(x, w, bias, backend="cpu"), F.linear(x, w, bias))
        torch.testing.assert_close(decode_linear(x, w, backend="cpu"), F.linear(x, w))
    assert decode_linear(torch.empty(0, 5), torch.randn(3, 5), backend="cpu").shape == (0, 3)
    assert decode_linear(torch.randn(2, 5), torch.empty(0, 5), backend="cpu").shape == (2, 0)


def test_gelu_of_large_numbers(backend_device):
    backend_device("cpu")
    bias = torch.tensor(
        [0.0, -0.0, 1e-30, -1e-30, 4, -4, 20, -20, 1e4, -1e4, 1e13, -1e13, 3e38, -3e38, torch.inf]
    )
    zero = torch.zeros(1, 1), torch.zeros(len(bias), 1)
    out = decode_linear(*zero, bias, activation="gelu_tanh", backend="cpu")[0]
    torch.testing.assert_close(out, F.gelu(bias, approximate="tanh"), atol=1e-7, rtol=1e-6)
    assert (
        decode_linear(*zero, torch.full_like(bias, torch.nan), activation="gelu_tanh", backend="cpu")
        .isnan()
        .all()
    )


def test_which_way_a_call_takes(backend_device, monkeypatch):
    backend_device("cpu")
    taken = []
    run = native.forward
    monkeypatch.setattr(native, "forward", lambda *a: taken.append(1) or run(*a))
    monkeypatch.setattr(_backends, "_passed", {})
    x, weight, bias = make(native.MOST_ROWS + 1)

    class Quantized(torch.Tensor):
        pass

    def kernel_runs(*arguments):
        taken.clear()
        decode_linear(*arguments)
        return bool(taken)

    for _ in range(2):  # the second time from memory
        assert kernel_runs(x[:-1], weight, bias) and not kernel_runs(x, weight, bias)
        assert not kernel_runs(x[:1].double(), weight.double())
        assert not kernel_runs(x[:1], weight.as_subclass(Quantized))
        assert not kernel_runs(x[:1], weight.clone().requires_grad_())
        with torch.no_grad():
            assert kernel_runs(x[:1], weight.clone().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16):
            assert not kernel_runs(x[:1], weight)
            assert decode_linear(x[:1], weight.bfloat16()).dtype == torch.bfloat16
    for arguments, message in (
        ((x, weight), "the cpu backend takes x of at most 16 rows, got 17; use backend='reference'"),
        ((x[:1].double(), weight.double()), "the cpu backend takes x in float32, float16 or bfloat16"),
        ((x[:1], weight.as_subclass(Quantized)), "the cpu backend takes a plain weight, got Quantized"),
        ((x[:1], weight.clone().requires_grad_()), "the cpu backend has no gradient"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            decode_linear(*arguments, backend="cpu")
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: decode_linear(x, weight.double(), activation="gelu_tanh"), x.double()
    )


def test_opcheck_and_compile(backend_device):
    backend_device("cpu")
    x, weight, bias = make(3)
    torch.library.opcheck(torch.ops.cogview_kernels.decode_linear, (x, weight, bias, "gelu_tanh", "cpu"))
    compiled = torch.compile(
        lambda *t: decode_linear(*t, activation="gelu_tanh"), fullgraph=True, backend="eager"
    )
    with torch.no_grad():
        assert torch.equal(compiled(x, weight, bias), decode_linear(x, weight, bias, activation="gelu_tanh"))
    assert decode_linear_op.name == "decode_linear"


ONES, ONE_ROW = torch.ones(3, 2), torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], ONES), {}, TypeError, "x must be a tensor, got list"),
        ((ONE_ROW, [1.0]), {}, TypeError, "weight must be a tensor, got list"),
        ((ONE_ROW, ONES, 0), {}, TypeError, "bias must be a tensor, got int"),
        ((ONE_ROW.long(), ONES), {}, TypeError, "x must be float32, float16, bfloat16 or float64"),
        ((torch.ones(()), ONES), {}, ValueError, r"x must be \[..., C\]"),
        ((ONE_ROW, torch.ones(3, 4)), {}, ValueError, r"weight must have shape \[O, 2\].*got \(3, 4\)"),
        ((ONE_ROW, ONES, torch.ones(2)), {}, ValueError, r"bias must have shape \(3,\)"),
        ((ONE_ROW, ONES.half()), {}, TypeError, "weight must have the dtype of x"),
        ((ONE_ROW, ONES, torch.ones(3).half()), {}, TypeError, "bias must have the dtype of x"),
        ((ONE_ROW, ONES.to("meta")), {}, ValueError, "weight must be on the device of x"),
        ((ONE_ROW, ONES), {"activation": "relu"}, ValueError, "activation must be one of None"),
        ((ONE_ROW, ONES), {"backend": "triton"}, NotImplementedError, "no triton backend"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        decode_linear(*arguments, **options)
