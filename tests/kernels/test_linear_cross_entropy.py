# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy: the reference by hand and by properties, then every backend against it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cogview_kernels import _device, _extension, linear_cross_entropy
from cogview_kernels.linear_cross_entropy import native, pieces
from cogview_kernels.linear_cross_entropy.objective import PLAIN, Objective
from cogview_kernels.linear_cross_entropy.op import backend_module, linear_cross_entropy_op
from cogview_kernels.linear_cross_entropy.pieces import Piece, Tokens
from cogview_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference as reference
from tests.helpers.tolerance import GRADIENT, assert_within_budget, judge
from tests.helpers.triton_compile import Call, assert_clean, benchmark_calls, compile_calls, meta

BACKENDS = ["cpu", "triton", "chunked"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["none", "sum", "mean"]

# name: (tokens, width, vocabulary, arguments). In these tests chunks are of 16 tokens, or ids, and rounds
# through the memory of dweight of as many tokens as the width. A Triton tile has 32 or 64 ids and 128 tokens.
CASES = {
    "one": (1, 1, 1, {}),
    "two_rounds": (15, 8, 32, {}),
    "a_chunk": (16, 24, 33, {"token_weight": True}),
    "past_a_chunk": (17, 32, 70, {"ignored": 5}),
    "rounds_and_a_bit": (37, 16, 101, {"ignored": 9, "token_weight": True}),
    "three_rounds": (53, 16, 101, {"vocab_range": (3, 97)}),
    "past_a_tile": (133, 136, 40, {"token_weight": True}),
    "range": (33, 16, 60, {"token_weight": True, "vocab_range": (7, 41)}),
    "padded_tail": (20, 16, 64, {"ignored": 3, "vocab_range": (0, 59)}),
}


@pytest.fixture(autouse=True)
def _chunks_of_16(monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 0)


@pytest.fixture(autouse=True)
def _tensors_where_the_backend_runs(request, backend_device):
    """A test's own backend, or the one of its name: new tensors are made on its device."""
    parameters = getattr(request.node, "callspec", None)
    backend = parameters.params.get("backend", "chunked") if parameters else "chunked"
    device = backend_device("triton" if "triton" in request.node.name else backend)
    if device.type == "cpu":
        yield
    else:
        with device:
            yield


def loss_of_reference(*inputs, **arguments):
    """The reference's loss alone."""
    return reference(*inputs, **arguments)[0]


def make_case(name: str, dtype: torch.dtype):
    N, C, V, options = CASES[name]
    hidden, weight = torch.randn(N, C).to(dtype), torch.randn(V, C).to(dtype)
    start, stop = options.get("vocab_range", (0, V))
    target = torch.randint(start, stop, (N,))
    arguments = {k: v for k, v in options.items() if k == "vocab_range"}
    if ignored := options.get("ignored", 0):
        target[torch.randperm(N)[:ignored]] = -100
    if options.get("token_weight"):
        arguments["token_weight"] = torch.rand(N) * torch.randint(0, 4, (N,))
    return (hidden, weight), target, arguments


def with_gradients(function, inputs, target, **arguments):
    inputs = [x.detach().requires_grad_() for x in inputs]
    loss = function(*inputs, target, **arguments)
    dloss = torch.linspace(0.5, 2.0, loss.numel()).view(loss.shape).to(loss)
    return loss.detach(), *torch.autograd.grad(loss, inputs, dloss)


# ---- the reference


def test_reference_by_hand():
    hidden, weight = (
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),
    )
    losses = loss_of_reference(hidden, weight, torch.tensor([0, 2]), reduction="none")
    e = torch.e
    torch.testing.assert_close(losses, torch.tensor([e + 2, e**2 + 2]).log() - torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference_equals_torch(reduction):
    (hidden, weight), target, arguments = make_case("past_a_chunk", torch.float64)
    ours = loss_of_reference(hidden, weight, target, reduction=reduction, **arguments)
    torch.testing.assert_close(ours, F.cross_entropy(hidden @ weight.T, target, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ["a_chunk", "past_a_chunk", "range"])
def test_reference_gradient(case, reduction):
    (hidden, weight), target, arguments = make_case(case, torch.float64)
    call = lambda h, w: loss_of_reference(  # noqa: E731
        h, w, target, reduction=reduction, **arguments
    )
    inputs = hidden[:, :5].clone().requires_grad_(), weight[:, :5].clone().requires_grad_()
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_range_is_as_if_the_rest_were_not_there(backend):
    (hidden, weight), target, _ = make_case("range", torch.float32)
    loss, dhidden, dweight = with_gradients(
        linear_cross_entropy, (hidden, weight), target, vocab_range=(7, 41), backend=backend
    )
    cut = with_gradients(linear_cross_entropy, (hidden, weight[7:41]), target - 7, backend=backend)
    torch.testing.assert_close((loss, dhidden, dweight[7:41]), cut)
    assert bool((dweight[:7] == 0).all()) and bool((dweight[41:] == 0).all())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_divides_by_the_sum_of_weights(dtype, backend):
    (hidden, weight), target, arguments = make_case("rounds_and_a_bit", dtype)
    arguments["backend"] = backend
    token_weight = arguments["token_weight"]
    losses = linear_cross_entropy(hidden, weight, target, reduction="none", **arguments)
    mean = linear_cross_entropy(hidden, weight, target, **arguments)
    assert losses.dtype == mean.dtype == torch.float32
    torch.testing.assert_close(mean, losses.sum() / token_weight[target != -100].sum())
    plain = linear_cross_entropy(hidden, weight, target, reduction="none", backend=backend)
    torch.testing.assert_close(losses, plain * token_weight)


# ---- every backend against the reference


def check(backend, dtype, case, reduction):
    inputs, target, arguments = make_case(case, dtype)
    arguments["reduction"] = reduction
    ours = with_gradients(linear_cross_entropy, inputs, target, backend=backend, **arguments)
    truth, eager = judge(lambda *x: with_gradients(loss_of_reference, x, target, **arguments), inputs)
    # A sum may be right by luck in eager arithmetic; it is judged by its parts.
    if reduction == "none":
        assert_within_budget(ours[0], eager[0], truth[0], dtype=torch.float32, name="loss")
    else:
        parts = linear_cross_entropy(*inputs, target, backend=backend, **{**arguments, "reduction": "none"})
        divisor = arguments.get("token_weight", torch.ones_like(parts))[target != -100].sum()
        torch.testing.assert_close(
            ours[0], parts.sum() / (divisor if reduction == "mean" else 1), rtol=1.3e-6, atol=1e-5
        )
    assert_within_budget(ours[1], eager[1], truth[1], dtype=dtype, factor=GRADIENT, name="dhidden")
    assert_within_budget(ours[2], eager[2], truth[2], dtype=dtype, factor=GRADIENT, name="dweight")


@pytest.mark.budget
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(backend, dtype, case, reduction):
    check(backend, dtype, case, reduction)


@pytest.mark.budget
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("case", ["a_chunk", "rounds_and_a_bit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_chunk(backend, dtype, case, reduction, monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 10**6)
    check(backend, dtype, case, reduction)


@pytest.mark.budget
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("isa", "dtype"), [("avx512", torch.float32), ("avx512bf16", torch.bfloat16), ("amx", torch.bfloat16)]
)
def test_products_of_the_extension(isa, dtype, case, reduction, monkeypatch, instruction_set):
    """They are for larger products than the cases have, and without tiles for AMD's processors."""
    instruction_set(isa)
    made = []

    def product(a, b, out, *, add=False, alpha=1.0):
        if isa == "amx" and a.stride(1) == 1:
            pieces.product(a, b, out, add=add, alpha=alpha)
        else:
            made.append(a.shape)
            _extension.call("linear_cross_entropy_product", "cpu", a, b, out, add, 0, False)

    monkeypatch.setattr(native, "product", product)
    check("cpu", dtype, case, reduction)
    assert made


@pytest.mark.budget
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_products_of_a_processor_without_16_bits(backend, dtype, case, reduction, monkeypatch):
    """They are made in float32, where PyTorch's would take a hundred times as long."""
    monkeypatch.setattr(_device, "emulates", lambda dtype: dtype != torch.float32)
    monkeypatch.setattr(native, "_is_faster", lambda a, b, out: False)
    monkeypatch.setattr(native, "adder", pieces.no_adder)
    monkeypatch.setattr(pieces, "WIDENED_SIDE", 32)
    monkeypatch.setattr(pieces, "WIDENED_DEPTH", 7)
    made, function = [], pieces._widened_product
    monkeypatch.setattr(
        pieces, "_widened_product", lambda *a, **b: made.append(a[0].dtype) or function(*a, **b)
    )
    check(backend, dtype, case, reduction)
    assert set(made) == {dtype}


@pytest.mark.parametrize("add", [False, True])
def test_memory_of_products_in_float32(monkeypatch, add):
    """A block of each operand and one of sums, and no operand as a whole."""
    monkeypatch.setattr(pieces, "WIDENED_SIDE", 64)
    monkeypatch.setattr(pieces, "WIDENED_DEPTH", 32)
    a, b = torch.randn(512, 640).bfloat16(), torch.randn(640, 256).bfloat16()
    out = torch.zeros(512, 256, dtype=torch.bfloat16)
    held = peak_bytes(lambda: pieces._widened_product(a, b, out, add=add, alpha=1.0))
    assert 0 < held <= 4 * (64 * 64 + 2 * 64 * 32) + 1024


@pytest.mark.parametrize(
    "lacking", [(), (torch.bfloat16,), (torch.float16,), (torch.bfloat16, torch.float16)]
)
def test_which_products_pytorch_has_none_of(lacking, monkeypatch):
    emulates = _device.emulates.__wrapped__  # without its cache
    told = {"_is_mkldnn_bf16_supported": torch.bfloat16, "_is_mkldnn_fp16_supported": torch.float16}
    answers = {name: lambda dtype=dtype: dtype not in lacking for name, dtype in told.items()}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**answers))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert emulates(dtype) == (dtype in lacking)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())  # as where PyTorch is built without oneDNN
    assert not emulates(torch.bfloat16)


@pytest.mark.budget
@pytest.mark.parametrize("kept", [1, 10, 30, 37])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_in_a_buffer(backend, dtype, kept, monkeypatch):
    """Up to all tokens but the last C. The pieces of 16 ids use up the whole buffer, or a third of it."""
    seen, function = [], pieces._in_place_of_dweight
    monkeypatch.setattr(pieces, "_sizes", lambda *_: pieces._Sizes(7, 16, kept))
    monkeypatch.setattr(pieces, "_in_place_of_dweight", lambda *a: seen.append(a[-1].kept) or function(*a))
    check(backend, dtype, "three_rounds", "mean")
    assert seen == [kept]


@pytest.mark.budget
@pytest.mark.parametrize("chunk", [5, 16, 64])
@pytest.mark.parametrize("case", ["past_a_chunk", "rounds_and_a_bit", "three_rounds", "padded_tail"])
def test_summed_in_24_bits(case, chunk, monkeypatch, instruction_set):
    """The last chunk is cut, or is the only one after the first C tokens."""
    instruction_set("avx512bf16")
    monkeypatch.setattr(_extension.native, "is_amd", lambda: True)
    seen, function = [], pieces._summed_in_24_bits

    def chosen(problem, dweight):
        return chunk if len(problem.hidden) > dweight.shape[1] else 0

    monkeypatch.setattr(pieces, "_chunk_beside_bytes", chosen)
    monkeypatch.setattr(pieces, "_summed_in_24_bits", lambda *a: seen.append(a[-1]) or function(*a))
    for reduction in ("none", "mean"):
        check("cpu", torch.bfloat16, case, reduction)
    assert set(seen) == ({chunk} if case != "past_a_chunk" else set())


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("isa", ["avx512", "avx512bf16", "amx"])
def test_room_for_24_bits(isa, amd, monkeypatch, instruction_set):
    """A byte for each of dweight and a chunk that is worth it, where the extension makes the products."""
    instruction_set(isa)
    monkeypatch.setattr(_extension.native, "is_amd", lambda: amd)
    N, C, V = 2000, 300, 900

    def chunk(room, dtype=torch.bfloat16, tokens=N, steps=native):
        problem = SimpleNamespace(hidden=torch.empty(tokens, C), weight=None, room=room, steps=steps)
        return pieces._chunk_beside_bytes(problem, torch.empty(V, C, dtype=dtype))

    serves = amd and isa == "avx512bf16"
    token = V + 16 * C  # logits, and eight floats for each number of dhidden
    assert chunk(V * 150 + 128 * token) == (128 if serves else 0)
    assert chunk(V * 150 + 128 * token - 1) == 0
    assert chunk(V * 150 + 421 * token) == (416 if serves else 0)
    assert chunk(V * N, tokens=C) == chunk(V * N, torch.float32) == chunk(V * N, torch.float16) == 0
    assert chunk(V * N, steps=backend_module("chunked")) == chunk(V * N, steps=backend_module("triton")) == 0


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_no_logits_twice_in_a_quarter_of_their_memory(share, monkeypatch, instruction_set, one_thread):
    """By 24 bits, and in no more memory than was allowed but for 2 MB of what one thread packs and sums."""
    instruction_set("avx512bf16")
    monkeypatch.setattr(_extension.native, "is_amd", lambda: True)
    N, C, V = 1600, 320, 6000
    inputs = (torch.randn(N, C) * 0.3).bfloat16(), torch.randn(V, C).bfloat16()
    leaves, target, made = [x.requires_grad_() for x in inputs], torch.randint(0, V, (N,)), []
    logits = pieces._Problem.logits

    def counted(self, tokens, ids, out):
        made.append(out.numel())
        logits(self, tokens, ids, out)

    monkeypatch.setattr(pieces._Problem, "logits", counted)
    call = functools.partial(linear_cross_entropy, *leaves, target, extra_memory=share)
    gradients = torch.autograd.grad(call(), leaves)
    assert sum(made) == N * V
    allowed = share * N * V * 2 + 2 * 2**20
    assert peak_bytes(lambda: torch.autograd.grad(call(), leaves)) <= allowed + sum(
        x.numel() * x.element_size() for x in gradients
    )


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extra_memory(backend, reduction, monkeypatch):
    """The same gradients up to their rounding, and fewer logits made twice."""
    monkeypatch.setattr(native, "adder", pieces.no_adder)  # which makes none twice, on AMD's processors
    N, C, V = 400, 16, 300
    hidden, weight = torch.randn(N, C).bfloat16(), torch.randn(V, C).bfloat16()
    target, made = torch.randint(0, V, (N,)), []
    logits = pieces._Problem.logits
    monkeypatch.setattr(
        pieces._Problem,
        "logits",
        lambda self, tokens, ids, out: made.append(out.numel()) or logits(self, tokens, ids, out),
    )

    def run(share):
        made.clear()
        arguments = {"reduction": reduction, "backend": backend, "extra_memory": share}
        results = with_gradients(linear_cross_entropy, (hidden, weight), target, **arguments)
        return results, sum(made)

    least, most_made = run(0)
    # The losses alone take a product of their own.
    assert most_made == (1 + (reduction == "none")) * N * V + (N - C) * V
    # 64 or 192 tokens are kept, but the pieces of 16 ids use up the rows of 112 or 48 ids.
    for share, kept in ((0.2, 64 * (V - 112)), (0.6, 192 * (V - 48)), (1, (N - C) * V)):
        ours, our_made = run(share)
        assert most_made - our_made == kept, share
        for a, b in zip(ours, least, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.parametrize(
    ("multiprocessors", "extra_memory", "expected"),
    [
        (132, 0.0, (1664, 1664, 0)),
        (132, 0.03, (1664, 1664, 0)),
        (132, 0.12, (1664, 1664, 1024)),
        (132, 0.5, (1664, 1664, 4352)),
        (132, 0.75, (1664, 1664, 6144)),
        (108, 0.12, (2560, 1280, 1024)),
    ],
)
def test_sizes_on_a_gpu(multiprocessors, extra_memory, expected, monkeypatch):
    """Whole waves of tiles, in no more than was promised."""
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 14 * 2**20)
    monkeypatch.setattr(_device, "multiprocessors", lambda device: multiprocessors)
    N, C, V = 8704, 2560, 58240
    room = int(extra_memory * N * V)
    sizes = pieces._sizes(N, C, V, room, torch.device("cuda"))
    assert sizes == expected
    assert max(sizes.ids * N, sizes.kept * V) <= max(room, 0.029 * N * V)


@pytest.mark.parametrize("N", [250, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_that_fit_in_one_chunk_are_one_chunk(dtype, N, monkeypatch):
    """Though their number is no multiple of a tile: 16-bit gradients are not summed over chunks."""
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", N * 30)
    hidden, weight = torch.randn(N, 8).to(dtype), torch.randn(30, 8).to(dtype)
    target = torch.randint(0, 30, (N,))
    call = lambda *inputs, **k: with_gradients(linear_cross_entropy, inputs, target, **k)  # noqa: E731
    truth, eager = judge(lambda *x: with_gradients(loss_of_reference, x, target), (hidden, weight))
    for a, e, t in zip(call(hidden, weight)[1:], eager[1:], truth[1:], strict=True):
        assert_within_budget(a, e, t, dtype=dtype, factor=GRADIENT)
    # Elsewhere than on the CPU a chunk has no room to spare.
    problem = SimpleNamespace(hidden=hidden.to("meta"), weight=weight, room=0)
    assert pieces._chunk_of_tokens(problem) == N


@pytest.mark.parametrize(
    ("dtype", "N", "chunk", "way"),
    [
        (torch.float32, 20, 20 * 30, "_accumulated"),
        (torch.float32, 20, 0, "_accumulated"),
        (torch.float32, 8, 0, "_in_place_of_dweight"),
        (torch.bfloat16, 20, 20 * 30, "_accumulated"),
        (torch.bfloat16, 20, 20 * 30 - 1, "_in_place_of_dweight"),
    ],
)
def test_way_to_the_gradients(dtype, N, chunk, way, monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", chunk)
    hidden, weight = torch.randn(N, 8).to(dtype), torch.randn(30, 8).to(dtype)
    seen = []
    for name in ("_accumulated", "_in_place_of_dweight", "_losses_only"):
        function = getattr(pieces, name)
        monkeypatch.setattr(
            pieces, name, lambda *a, name=name, function=function: seen.append(name) or function(*a)
        )
    with_gradients(linear_cross_entropy, (hidden, weight), torch.randint(0, 30, (N,)))
    linear_cross_entropy(hidden, weight, torch.randint(0, 30, (N,)))
    assert seen == [way, "_losses_only"]


@pytest.mark.budget
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
@pytest.mark.parametrize("backend", ["cpu"])
def test_every_instruction_set(isa, backend, instruction_set):
    instruction_set(isa)
    for dtype in DTYPES:
        check(backend, dtype, "past_a_tile", "none")


def matrix(rows, columns, dtype, transposed):
    """Random, in the middle of a larger one."""
    if transposed:
        return matrix(columns, rows, dtype, False).T
    return torch.randn(rows, columns + 3).to(dtype)[:, 1 : columns + 1]


ORDERS = ("rows", "columns of a", "columns of b")
PAIRS = ("avx512bf16", "amx")
# Tiles take columns of a alone.
PRODUCTS = [
    *((isa, torch.float32, order) for isa in ("portable", "avx2", "avx512", *PAIRS) for order in ORDERS),
    *(("avx512bf16", torch.bfloat16, order) for order in ORDERS),
    ("amx", torch.bfloat16, "columns of a"),
]


@pytest.mark.parametrize(("isa", "dtype", "order"), PRODUCTS, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(3, 5, 1), (33, 64, 31), (32, 95, 300), (70, 33, 2305), (5, 3, 9001), (1200, 500, 1100)],
)
def test_product(isa, dtype, order, M, N, K, instruction_set):
    """Rows that lie apart; results and parts that are cut; more threads than parts, so that slices are."""
    instruction_set(isa)
    a, b = matrix(M, K, dtype, order == "columns of a"), matrix(K, N, dtype, order == "columns of b")
    exact, sizes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    found = []
    for threads, start in ((1, None), (3, None), (11, None), (40, None), (2, 7.0)):
        out = torch.full((M, N + 2), 7.0, dtype=dtype)
        arguments = (a, b, out[:, :N], start is not None, 0, False, threads)
        _extension.native.linear_cross_entropy_product_cpu(*arguments)
        assert bool((out[:, N:] == 7).all())
        # Half of a last bit, and what K sums in float32 can lose.
        wanted = exact + (start or 0)
        size = (sizes + (start or 0)) * (K + 1) * 2**-24
        half = wanted.abs() * (2**-8 if dtype == torch.bfloat16 else 2**-24)
        assert bool(((out[:, :N].double() - wanted).abs() <= half + size).all())
        if start is None:
            found.append(out[:, :N])
    assert all(torch.equal(out, found[0]) for out in found)


@pytest.mark.parametrize("columns_of_b", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(3, 5, 1), (33, 64, 31), (100, 95, 300)])
def test_products_summed_in_24_bits(M, N, K, columns_of_b, instruction_set):
    """Ten products: each may lose half of the last of 16 bits, and the last one rounds to bfloat16."""
    instruction_set("avx512bf16")

    def value_of(high, low):
        bits = (high.contiguous().view(torch.int16).int() << 16) | (low.int() << 8)
        return bits.view(torch.float32).double()

    for threads in (1, 3):
        out, low = torch.full((M, N + 2), 7.0).bfloat16(), torch.full((M, N), 77, dtype=torch.uint8)
        before, size = torch.zeros(M, N, dtype=torch.float64), torch.zeros(M, N, dtype=torch.float64)
        for step in range(10):
            a, b = matrix(M, K, torch.bfloat16, False), matrix(K, N, torch.bfloat16, columns_of_b)
            exact = before + a.double() @ b.double()
            size += a.double().abs() @ b.double().abs()
            last = step == 9
            arguments = (a, b, out[:, :N], step > 0, low.data_ptr(), last, threads)
            _extension.native.linear_cross_entropy_product_cpu(*arguments)
            before = out[:, :N].double() if last else value_of(out[:, :N], low)
            lost = exact.abs() * (2**-8 if last else 2**-16) + size * (K + 1) * 2**-24
            assert bool(((before - exact).abs() <= lost).all())
            if K == 1 and step == 0:  # 16 bits hold a product of two numbers of 8
                assert torch.equal(before, exact)
        assert bool((out[:, N:] == 7).all())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_in_24_bits(value, instruction_set):
    instruction_set("avx512bf16")
    a, b = torch.ones(3, 4).bfloat16(), torch.ones(4, 5).bfloat16()
    out, low = torch.empty(3, 5).bfloat16(), torch.empty(3, 5, dtype=torch.uint8)
    for step in range(3):
        a[1, 2] = value if step == 0 else 1
        arguments = (a, b, out, step > 0, low.data_ptr(), step == 2, 1)
        _extension.native.linear_cross_entropy_product_cpu(*arguments)
    expected = torch.full((3, 5), 12.0)
    expected[1] = value
    torch.testing.assert_close(out.float(), expected, equal_nan=True)


@pytest.mark.parametrize(("isa", "dtype", "order"), PRODUCTS, ids=str)
def test_product_of_numbers_that_are_none(isa, dtype, order, instruction_set):
    """They stay in their row and column, though blocks are padded."""
    instruction_set(isa)
    a, b = torch.ones(5, 41).to(dtype), torch.ones(41, 7).to(dtype)
    a[1, 3], b[40, 6] = float("nan"), float("inf")
    if order == "columns of a":
        a = a.T.contiguous().T
    if order == "columns of b":
        b = b.T.contiguous().T
    out = torch.empty(5, 7).to(dtype)
    _extension.native.linear_cross_entropy_product_cpu(a, b, out, False, 0, False, 2)
    torch.testing.assert_close(out, (a.float() @ b.float()).to(dtype), equal_nan=True)


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16", "amx"])
def test_whose_product(isa, amd, monkeypatch, instruction_set):
    """The extension's where it was found faster, and never one that it does not have."""
    instruction_set(isa)
    monkeypatch.setattr(_extension.native, "is_amd", lambda: amd)
    seen = []
    monkeypatch.setattr(_extension, "call", lambda *a: seen.append("extension"))
    monkeypatch.setattr(pieces, "product", lambda *a, **b: seen.append("torch"))
    large, small = torch.empty(2048, 64), torch.empty(16, 64)

    def maker(a, b):
        native.product(a, b, torch.empty(a.shape[0], b.shape[1], dtype=a.dtype))
        return seen.pop()

    rows = amd and isa != "amx"
    assert maker(large, large.T) == ("extension" if rows else "torch")
    assert maker(large, small.T) == "torch"
    assert maker(large.half(), large.half().T) == "torch"
    assert maker(large[:, ::2], large[:, ::2].T) == "torch"
    assert maker(large.T, large) == ("extension" if rows else "torch")
    assert maker(large.T, large.T.contiguous().T) == "torch"
    pairs = large.bfloat16()
    assert maker(pairs, pairs.T) == ("extension" if amd and isa == "avx512bf16" else "torch")
    assert maker(pairs.T, pairs) == (
        "extension" if isa == "amx" or (amd and isa == "avx512bf16") else "torch"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_over_many_parts(backend):
    """More ids than one part of the vocabulary, in every part a target."""
    steps = backend_module(backend)
    logits, target = 3 * torch.randn(2100, 21), torch.linspace(0, 2099, 21).long()
    wide, stats = torch.empty(2100, 30), torch.empty(3, 21)
    view = wide[:, 2:23]
    view.copy_(logits)
    coefficient = torch.randn(21)
    # A token that does not count may have logits of any kind.
    coefficient[4] = 0
    tokens = Tokens(target, coefficient, stats)
    steps.reduce(Piece(view, 0, 2100), tokens, PLAIN)
    peak, total, picked = stats.double()
    torch.testing.assert_close(peak + total.log(), logits.double().logsumexp(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(picked.float(), logits[target, torch.arange(21)])
    view[100:, 4] = torch.nan
    # Rows 100 and on of the vocabulary alone.
    steps.gradient(Piece(view[100:], 100, 2100), tokens, PLAIN, None)
    onehot = F.one_hot(target, 2100).T
    expected = coefficient * (logits.double().softmax(0) - onehot)
    torch.testing.assert_close(view[100:].double(), expected[100:], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(view[:100], logits[:100], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_offsets_of_64_bits(backend, monkeypatch):
    """Rows 2^30 elements apart, in memory that is never touched between them."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    steps, results = backend_module(backend), []
    near, target, coefficient = torch.randn(3, 20).bfloat16(), torch.arange(20) % 3, torch.randn(20)
    far = torch.empty(2**31 + 20, dtype=torch.bfloat16).as_strided((3, 20), (2**30, 1))
    far.copy_(near)
    for logits in (near, far):
        tokens = Tokens(target, coefficient, torch.empty(3, 20))
        steps.reduce(Piece(logits, 0, 3), tokens, PLAIN)
        steps.gradient(Piece(logits, 0, 3), tokens, PLAIN, None)
        results.append((tokens.stats, logits.clone()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, dtype):
    inputs, target, arguments = make_case("rounds_and_a_bit", dtype)
    runs = [with_gradients(linear_cross_entropy, inputs, target, backend=backend, **arguments) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    (hidden, weight), target, _ = make_case("rounds_and_a_bit", torch.float32)
    target = target.clamp(min=0)
    expected = with_gradients(linear_cross_entropy, (hidden, weight), target, backend=backend)
    strided = hidden.T.contiguous().T, weight.repeat(1, 2)[:, :16]
    ours = with_gradients(
        linear_cross_entropy, strided, target.repeat(2, 1).T.flatten()[::2], backend=backend
    )
    torch.testing.assert_close(ours, expected)


def peak_bytes(function) -> int:
    """The most memory that PyTorch held at once during a call, beyond what it held before (CPU)."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    del result
    return highest


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(_extension.native is None, reason=_extension.missing_reason)
@pytest.mark.parametrize("extra_memory", [0, 0.12, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_beyond_the_gradients(dtype, extra_memory, monkeypatch, one_thread):
    """At most 3 % of the logits for chunks of 2.9 % of them, as at 8,704 tokens; forward and backward.

    Gradients in float32 take twice as much, and where more is allowed, no more than that. One thread: for
    several, oneDNN splits the long sums of a product in bfloat16, and holds what each of them has summed.
    """
    N, C, V = 600, 160, 6000
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", int(0.029 * N * V))
    # What products in float32 hold is bounded by itself, and more than that at this size.
    monkeypatch.setattr(_device, "emulates", lambda dtype: False)
    hidden, weight = torch.randn(N, C).to(dtype), torch.randn(V, C).to(dtype)
    target = torch.randint(0, V, (N,))
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    call = functools.partial(linear_cross_entropy, extra_memory=extra_memory)
    losses = lambda: call(hidden, weight, target)  # noqa: E731
    # The factor of 2 must be applied, in place. The range is a padded vocabulary's.
    gradients = lambda: torch.autograd.grad(  # noqa: E731
        2 * call(*leaves, target.clamp(max=V - 22), vocab_range=(0, V - 21)), leaves
    )
    # Not counted: a few numbers a token, next to nothing at the real size, and what oneDNN packs operands in.
    products = (weight, hidden[:C].T), (torch.randn(V, C).to(dtype).T, weight)
    packed = max(
        peak_bytes(lambda a=a, b=b: torch.mm(a, b)) - len(a) * C * a.element_size() for a, b in products
    )
    allowed = (extra_memory or 0.03) * N * V * hidden.element_size() + packed + 64 * N
    assert peak_bytes(losses) <= allowed
    if dtype == torch.float32:
        allowed += max(0.06 - (extra_memory or 0.03), 0) * N * V * 4
    assert peak_bytes(gradients) - sum(x.numel() * x.element_size() for x in leaves) <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("extra_memory", [0, 0.12, 0.5, 1])
def test_gpu_memory_beyond_the_gradients(extra_memory, monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 14 * 2**20)
    N, C, V = 8704, 2560, 58240
    leaves = [torch.randn(n, C, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (N, V)]
    target = torch.randint(0, V, (N,), device="cuda")
    call = functools.partial(linear_cross_entropy, extra_memory=extra_memory)
    torch.autograd.grad(2 * call(*leaves, target), leaves)  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(2 * call(*leaves, target), leaves)
    own = sum(x.numel() * x.element_size() for x in gradients)
    # Partial sums take less than a megabyte: 12 bytes, 128 tokens, four programs a multiprocessor.
    allowed = (extra_memory or 0.03) * 2 * N * V + 64 * N + 2**20
    assert torch.cuda.max_memory_allocated() - before - own <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend):
    """What is saved may be overwritten by the last backward pass alone."""
    inputs, target, _ = make_case("a_chunk", torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    loss = 3 * linear_cross_entropy(*leaves, target, backend=backend)
    first = [x.clone() for x in torch.autograd.grad(loss, leaves, retain_graph=True)]
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), tuple(first))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_tokens_that_do_not_count_are_not_read(backend, reduction):
    hidden, weight = torch.randn(40, 8), torch.randn(30, 8)
    target, token_weight = torch.randint(0, 30, (40,)), torch.ones(40)
    target[3:6], token_weight[20:24] = -1, 0
    expected = with_gradients(
        linear_cross_entropy, (hidden, weight), target, token_weight=token_weight, ignore_index=-1,
        reduction=reduction, backend="reference",
    )  # fmt: skip
    hidden[3:6], hidden[20:24] = 1e30, -1e30
    ours = with_gradients(
        linear_cross_entropy, (hidden, weight), target, token_weight=token_weight, ignore_index=-1,
        reduction=reduction, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(ours, expected)
    assert bool((ours[1][3:6] == 0).all()) and bool((ours[1][20:24] == 0).all())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nothing_to_count(backend):
    hidden, weight = torch.randn(5, 8), torch.randn(30, 8)
    none = torch.full((5,), -100)
    for inputs, target in (((hidden[:0], weight), none[:0]), ((hidden, weight), none)):
        losses, dhidden, dweight = with_gradients(
            linear_cross_entropy, inputs, target, reduction="none", backend=backend
        )
        assert losses.shape == target.shape and not losses.any() and not dhidden.any() and not dweight.any()
        assert linear_cross_entropy(*inputs, target, reduction="sum", backend=backend) == 0
        assert linear_cross_entropy(*inputs, target, backend=backend).isnan()  # as F.cross_entropy


def eager(function):
    return function


def dispatched(function):
    """Through the dispatcher, as torch.compile goes."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("why", ["ignored", "weight 0"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("route", "dtype"), [(eager, torch.float32), (eager, torch.float16), (dispatched, torch.float32)]
)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nothing_to_count_has_a_gradient_of_zero(backend, route, dtype, reduction, why):
    """One such micro batch must not spoil an accumulated step, by whatever its loss is divided."""
    leaves = [torch.randn(n, 8).to(dtype).requires_grad_() for n in (5, 30)]
    target, token_weight = torch.full((5,), -100), None
    if why == "weight 0":
        target, token_weight = torch.arange(5), torch.zeros(5)
    loss = route(linear_cross_entropy)(
        *leaves, target, token_weight=token_weight, reduction=reduction, backend=backend
    )
    expected = F.cross_entropy(leaves[0] @ leaves[1].T, torch.full((5,), -100), reduction=reduction)
    torch.testing.assert_close(loss, expected.float(), equal_nan=True)
    # A loss divided by no tokens brings an infinite gradient.
    for divisor in (1, 0):
        given = torch.autograd.grad((loss / divisor).sum(), leaves, retain_graph=True)
        assert all(bool((x == 0).all()) for x in given)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_infinite_gradients_stop_at_tokens_that_do_not_count(backend):
    hidden, weight = (torch.randn(n, 8).requires_grad_() for n in (4, 30))
    target = torch.tensor([3, -100, 5, 7])
    losses = linear_cross_entropy(hidden, weight, target, reduction="none", backend=backend)
    dlosses = torch.tensor([1.0, torch.inf, 2.0, 0.5])
    ours = torch.autograd.grad(losses, (hidden, weight), dlosses)
    plain = F.cross_entropy(hidden @ weight.T, target, reduction="none")
    torch.testing.assert_close(ours, torch.autograd.grad(plain, (hidden, weight), dlosses))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("route", [eager, dispatched])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_losses_beside_the_loss(backend, route, reduction):
    (hidden, weight), target, arguments = make_case("rounds_and_a_bit", torch.float32)
    arguments |= {"reduction": reduction, "backend": backend}
    leaves = [hidden.view(1, 37, 16).requires_grad_(), weight.requires_grad_()]
    target, token_weight = target.view(1, 37), arguments.pop("token_weight").view(1, 37)
    call = route(linear_cross_entropy)
    loss, losses = call(*leaves, target, token_weight=token_weight, return_losses=True, **arguments)
    alone = linear_cross_entropy(*leaves, target, token_weight=token_weight, **arguments)
    plain = F.cross_entropy(hidden @ weight.T, target[0], reduction="none")
    assert losses.dtype == torch.float32 and not losses.requires_grad and loss.requires_grad
    torch.testing.assert_close(losses, torch.where(token_weight == 0, 0, plain.detach()))
    torch.testing.assert_close(loss, alone, rtol=0, atol=0)
    dloss = torch.rand_like(loss)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves, dloss), torch.autograd.grad(alone, leaves, dloss), rtol=0, atol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_beside_the_loss_take_no_product_of_matrices(backend):
    """Neither forward nor backward: that is what they are for."""
    (hidden, weight), target, _ = make_case("a_chunk", torch.float32)

    def products(**arguments):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss = linear_cross_entropy(*leaves, target, backend=backend, **arguments)
            (loss[0] if arguments else loss).backward()
        return sum(
            event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_")
        )

    assert products(return_losses=True) == products() > 0


@pytest.mark.budget
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_under_a_loss_scale(backend, scale, reduction, monkeypatch):
    """Many tokens and a large vocabulary: gradients of a logit below what float16 holds, unless scaled."""
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 10**6)
    hidden, weight = torch.randn(64, 16).half(), (0.1 * torch.randn(3000, 16)).half()
    target = torch.randint(0, 3000, (64,))
    call = lambda f, *xs, **k: torch.autograd.grad(f(*xs, target, **k).mean() * scale, xs)  # noqa: E731
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def of_reference(*inputs):
        widened = torch.promote_types(inputs[0].dtype, torch.float32)
        eager = lambda h, w, t: F.cross_entropy(F.linear(h, w).to(widened), t)  # noqa: E731
        return call(eager, *(x.requires_grad_() for x in inputs))

    truth, eager = judge(of_reference, leaves)
    ours = call(linear_cross_entropy, *leaves, reduction=reduction, backend=backend)
    for a, e, t in zip(ours, eager, truth, strict=True):
        assert_within_budget(a, e, t, dtype=torch.float16, factor=GRADIENT)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_small_factors_are_applied_last(backend, reduction, monkeypatch):
    """1e-4 times a probability of 1/3000 is below float16; times a hidden state of 1000 it no longer is."""
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 10**6)
    hidden, weight = (1000 * torch.randn(64, 16)).half(), (1e-4 * torch.randn(3000, 16)).half()
    target = torch.randint(0, 3000, (64,))
    gradients = []
    for dtype in (torch.float16, torch.float64):
        name = "reference" if dtype == torch.float64 else backend
        w = weight.to(dtype).requires_grad_()
        loss = linear_cross_entropy(hidden.to(dtype), w, target, reduction=reduction, backend=name)
        gradients.append(torch.autograd.grad(loss.sum() * 1e-4, w)[0].double())
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rare_tokens_keep_their_gradient(backend):
    """An id of probability 1e-30 still receives its share, 1e-30 times the hidden state."""
    hidden, weight = torch.tensor([[69.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    _, _, dweight = with_gradients(
        linear_cross_entropy, (hidden, weight), torch.tensor([0]), reduction="sum", backend=backend
    )
    p = torch.tensor(-69.0, dtype=torch.float64).exp().item()
    assert dweight[1, 1].item() == pytest.approx(0.5 * p, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_logits_at_the_limit(backend):
    hidden, weight = torch.full((2, 4), 128.0).half(), torch.full((3, 4), 120.0).half()
    weight[1] = -120.0
    loss, dhidden, dweight = with_gradients(
        linear_cross_entropy, (hidden, weight), torch.tensor([0, 2]), backend=backend
    )
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    assert bool(dhidden.isfinite().all()) and bool(dweight.isfinite().all())


# ---- bias, softcap, z-loss, label smoothing

OPTIONS = {
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "z_loss": {"z_loss": 0.1},
    "label_smoothing": {"label_smoothing": 0.2},
    "all": {"bias": True, "softcap": 5.0, "z_loss": 0.05, "label_smoothing": 0.1, "vocab_range": (3, 38)},
}


def make_options_case(case: str, name: str, dtype: torch.dtype):
    """As ``make_case``; the third input is the bias, where there is one."""
    inputs, target, arguments = make_case(case, dtype)
    options = dict(OPTIONS[name])
    if options.pop("bias", False):
        inputs = (*inputs, 2 * torch.randn(len(inputs[1])).to(dtype))
    if "vocab_range" in options:
        start, stop = options["vocab_range"]
        target = torch.where(target < 0, target, target.clamp(start, stop - 1))
    return inputs, target, arguments | options


def call_with_bias(hidden, weight, *rest, **arguments):
    """``(hidden, weight, bias, target)`` or without the bias."""
    *bias, target = rest
    return linear_cross_entropy(hidden, weight, target, bias=bias[0] if bias else None, **arguments)


def check_options(backend, dtype, case, name, reduction):
    inputs, target, arguments = make_options_case(case, name, dtype)
    arguments["reduction"] = reduction
    call = functools.partial(call_with_bias, **arguments)
    ours = with_gradients(call, inputs, target, backend=backend)
    of_reference = lambda *x: with_gradients(call, x, target, backend="reference")  # noqa: E731
    truth, eager = judge(of_reference, inputs)
    if reduction == "none":
        assert_within_budget(ours[0], eager[0], truth[0], dtype=torch.float32, name="loss")
    for i, gradient in enumerate(("dhidden", "dweight", "dbias")[: len(inputs)], 1):
        assert_within_budget(ours[i], eager[i], truth[i], dtype=dtype, factor=GRADIENT, name=gradient)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference_with_options_equals_torch(reduction):
    inputs, target, arguments = make_options_case("past_a_chunk", "all", torch.float64)
    start, stop = arguments.pop("vocab_range")
    hidden, weight, bias = inputs
    logits = 5 * torch.tanh((hidden @ weight.T + bias)[:, start:stop] / 5)
    counted = target != -100
    losses = F.cross_entropy(
        logits, torch.where(counted, target - start, -100), reduction="none", label_smoothing=0.1
    )
    losses = losses + torch.where(counted, 0.05 * logits.logsumexp(-1) ** 2, 0)
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counted.sum()}[reduction]
    arguments |= {"vocab_range": (start, stop), "reduction": reduction, "backend": "reference"}
    torch.testing.assert_close(call_with_bias(*inputs, target, **arguments), expected)
    narrow = [hidden[:, :4].clone(), weight[:, :4].clone(), bias]
    call = lambda *x: call_with_bias(*x, target, **arguments)  # noqa: E731
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in narrow], fast_mode=True)


@pytest.mark.budget
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options(backend, dtype, name):
    """Rounds and pieces of 16, and then all at once."""
    check_options(backend, dtype, "rounds_and_a_bit", name, "none")
    check_options(backend, dtype, "past_a_tile", name, "mean")


@pytest.mark.budget
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
@pytest.mark.parametrize("backend", ["cpu"])
def test_options_in_every_instruction_set(isa, backend, instruction_set):
    instruction_set(isa)
    for dtype in DTYPES:
        check_options(backend, dtype, "past_a_tile", "all", "none")


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_with_options_over_many_pieces(backend):
    """Several parts in each of two pieces, the first ids without a chance."""
    steps, V, n = backend_module(backend), 700, 21
    logits, target = 3 * torch.randn(V, n) + 40, torch.linspace(0, V - 1, n).long()
    bias, objective = torch.randn(V), Objective(label_smoothing=0.3, softcap=60.0, z_loss=0.01)
    tokens = Tokens(target, torch.randn(n), torch.empty(4, n), torch.empty(n, dtype=torch.int64))
    seen = (60 * torch.tanh((logits.double() + bias[:, None]) / 60)).requires_grad_()
    given = logits.clone()
    for ids in (slice(0, 520), slice(520, V)):
        steps.reduce(Piece(given[ids], ids.start, V, bias[ids]), tokens, objective)
    losses = objective.losses(tokens.stats, V)
    expected = F.cross_entropy(seen.T, target, reduction="none", label_smoothing=0.3)
    expected = expected + 0.01 * seen.logsumexp(0) ** 2
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=0)
    assert torch.equal(tokens.predicted, seen.argmax(0))
    dbias = torch.ones(V)
    for ids in (slice(0, 520), slice(520, V)):
        steps.gradient(Piece(given[ids], ids.start, V, bias[ids]), tokens, objective, dbias[ids])
    (dseen,) = torch.autograd.grad((tokens.coefficient * expected).sum(), seen)
    dlogits = dseen * (1 - (seen.detach() / 60) ** 2)
    torch.testing.assert_close(given.double(), dlogits, rtol=2e-5, atol=1e-8)
    torch.testing.assert_close(dbias.double() - 1, dlogits.sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_bias_of_minus_infinity_takes_ids_out(backend):
    """Whole tiles and parts of them, at the beginning as well."""
    hidden, weight, bias = torch.randn(9, 8), torch.randn(300, 8), torch.zeros(300)
    bias[:140] = -torch.inf
    target = torch.randint(140, 300, (9,))
    ours = with_gradients(functools.partial(call_with_bias, backend=backend), (hidden, weight, bias), target)
    cut = with_gradients(linear_cross_entropy, (hidden, weight[140:]), target - 140, backend="reference")
    torch.testing.assert_close(ours[:2], cut[:2])
    torch.testing.assert_close(ours[2][140:], cut[2])
    assert not ours[2][:140].any() and not ours[3][:140].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_with_a_large_z_loss(backend):
    """A softmax's denominator of e^800 makes gradients of the logits 1,600 times larger."""
    hidden, weight = torch.full((8, 4), 16.0).half(), torch.full((40, 4), 12.5).half()
    weight[20:] = -1
    target = torch.arange(8)
    ours, expected = (
        with_gradients(linear_cross_entropy, (hidden.to(t), weight.to(t)), target, z_loss=1.0, backend=b)
        for t, b in ((torch.float16, backend), (torch.float64, "reference"))
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4e-3, atol=1e-2)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_predicted_tokens(backend):
    (hidden, weight), target, arguments = make_case("rounds_and_a_bit", torch.float32)
    bias, token_weight = torch.randn(len(weight)), arguments["token_weight"]
    target = target.clamp(min=20, max=89)
    target[4:7] = -100
    loss, predicted = linear_cross_entropy(
        hidden.view(1, 37, 16), weight, target[None], bias=bias, token_weight=token_weight[None],
        vocab_range=(20, 90), return_predicted_tokens=True, backend=backend,
    )  # fmt: skip
    logits = (hidden @ weight.T + bias)[:, 20:90]
    counts = (token_weight != 0) & (target != -100)
    assert predicted.shape == (1, 37) and predicted.dtype == torch.int64 and not predicted.requires_grad
    assert torch.equal(predicted[0], torch.where(counts, 20 + logits.argmax(-1), -1))
    # Of equal logits the first. Small integers: rounded products of equal rows may differ, since a matrix
    # product may sum its last columns in another order.
    same = linear_cross_entropy(
        (4 * hidden).round(), (4 * weight[:1]).round().repeat(150, 1), target, return_predicted_tokens=True,
        backend=backend,
    )[1]  # fmt: skip
    assert torch.equal(same, torch.where(target == -100, -1, 0))
    # No other loss, in any company.
    more = linear_cross_entropy(
        hidden, weight, target, bias=bias, token_weight=token_weight, vocab_range=(20, 90),
        return_losses=True, return_predicted_tokens=True, backend=backend,
    )  # fmt: skip
    assert len(more) == 3 and torch.equal(more[0], loss) and torch.equal(more[2], predicted[0])


# ---- what is frozen


def products_and_saved(call) -> tuple[int, int]:
    """How many matrix products forward and backward take, and the bytes kept between them."""
    kept = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            loss = call()
        loss.backward()
    names = ("aten::mm", "aten::addmm_", "aten::addmm")
    products = sum(event.count for event in profile.key_averages() if event.key in names)
    return products, sum(x.numel() * x.element_size() for x in kept)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen(backend, dtype, reduction):
    """Rounds through the memory of dweight, or chunks; the other gradients are the same."""
    inputs, target, arguments = make_options_case("three_rounds", "bias", dtype)
    arguments |= {"reduction": reduction, "backend": backend}
    dloss = torch.linspace(0.5, 2.0, len(target)) if reduction == "none" else None

    def gradients(trained):
        leaves = [x.clone().requires_grad_(i in trained) for i, x in enumerate(inputs)]
        call_with_bias(*leaves, target, **arguments).backward(dloss)
        return [x.grad for x in leaves]

    every = gradients((0, 1, 2))
    for trained in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        for i, (ours, expected) in enumerate(zip(gradients(trained), every, strict=True)):
            assert (ours is None) == (i not in trained)
            if ours is not None:
                tolerance = 1e-5 if dtype == torch.float32 else 2e-3
                torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("trained", "products", "kept"),
    [((0, 1, 2), 3, 3 * 40 * 8 + 3), ((0,), 2, 40 * 8 + 3), ((1,), 2, 2 * 40 * 8 + 3), ((2,), 1, 80 + 3)],
)
@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_what_is_frozen_takes_no_product_and_no_memory(backend, trained, products, kept, monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 10**6)
    leaves = [
        torch.randn(*shape).requires_grad_(i in trained) for i, shape in enumerate(((40, 8), (80, 8), (80,)))
    ]
    target = torch.randint(0, 80, (40,))
    taken = products_and_saved(lambda: call_with_bias(*leaves, target, backend=backend))
    # The 0-d mask of a loss over nothing is kept besides.
    assert taken[0] == products and taken[1] - 4 * kept - (4 * 80 if trained == (0, 1, 2) else 0) in range(9)


@pytest.mark.gpu
def test_gpu_nothing_waits_for_the_device():
    hidden, weight, bias = (
        torch.randn(*s, device="cuda", requires_grad=True) for s in ((40, 16), (90, 16), (90,))
    )
    target = torch.randint(0, 90, (40,), device="cuda")
    options = {"softcap": 9.0, "z_loss": 1e-3, "label_smoothing": 0.1, "return_predicted_tokens": True}
    call = lambda **more: call_with_bias(hidden, weight, bias, target, **options, **more)[0]  # noqa: E731
    call().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call().backward()
        call(reduction="none").sum().backward()
        with torch.no_grad():
            call(return_losses=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- PyTorch integration


@pytest.mark.parametrize("options", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, summed, options):
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    bias = torch.randn(30, requires_grad=True) if options else None
    objective = (0.1, 5.0, 1e-3) if options else PLAIN
    target, coefficient = torch.randint(2, 29, (20,)), torch.rand(20)
    given, numbers, wanted = (
        (hidden, weight, bias, target, coefficient),
        (2, 29, *objective),
        (True, True, options),
    )
    op = torch.ops.cogview_kernels.linear_cross_entropy.default
    torch.library.opcheck(op, (*given, *numbers, summed, *wanted, options, 0.12, backend))
    op = torch.ops.cogview_kernels.linear_cross_entropy_backward.default
    given = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in given)
    made = (*given[:2], torch.randn(30 if options else 0), torch.ones(3))
    known = (*(None,) * 5, *made) if summed else (*given, *(None,) * 4)
    dloss = torch.tensor(2.0) if summed else coefficient
    torch.library.opcheck(op, (dloss, *known, *numbers, *wanted, 0.12, backend))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_graph_break(backend, reduction):
    inputs, target, arguments = make_case("rounds_and_a_bit", torch.float32)
    arguments |= {"reduction": reduction, "backend": backend}
    torch.compiler.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        with_gradients(compiled, inputs, target, **arguments),
        with_gradients(linear_cross_entropy, inputs, target, **arguments),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_with_options(backend):
    inputs, target, arguments = make_options_case("rounds_and_a_bit", "all", torch.float32)
    arguments |= {"backend": backend, "return_losses": True, "return_predicted_tokens": True}
    torch.compiler.reset()
    call = lambda *x: call_with_bias(*x, target, **arguments)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    # The hidden states alone are trained, and then all.
    for trained in (1, 3):
        leaves = [x.clone().requires_grad_(i < trained) for i, x in enumerate(inputs)]
        ours, expected = compiled(*leaves), call(*leaves)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours[0], leaves[:trained]), torch.autograd.grad(expected[0], leaves[:trained])
        )


def test_compile_in_a_fresh_process():
    """What was compiled first in a process must not matter, nor what ran before it."""
    code = """
import torch
from cogview_kernels import linear_cross_entropy
leaves = [torch.randn(n, 24, requires_grad=True) for n in (40, 90)]
target = torch.randint(0, 80, (40,))
call = lambda h, w: linear_cross_entropy(2 * h, w, target, vocab_range=(0, 80)) * 3
compiled = torch.compile(call, fullgraph=True)(*leaves)
gradients = torch.autograd.grad(compiled, leaves)
torch.testing.assert_close(compiled, call(*leaves))
torch.testing.assert_close(gradients, torch.autograd.grad(call(*leaves), leaves))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_autocast_casts_as_linear_does():
    (hidden, weight), target, _ = make_case("past_a_chunk", torch.float32)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        loss, dhidden, dweight = with_gradients(linear_cross_entropy, (hidden, weight), target)
    assert loss == linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), target)
    assert dhidden.dtype == dweight.dtype == torch.float32


def test_leading_dimensions():
    (hidden, weight), target, _ = make_case("a_chunk", torch.float32)
    flat = linear_cross_entropy(hidden, weight, target, reduction="none")
    shaped = linear_cross_entropy(hidden.view(2, 8, 24), weight, target.view(2, 8), reduction="none")
    torch.testing.assert_close(shaped, flat.view(2, 8))
    torch.testing.assert_close(linear_cross_entropy(hidden[0], weight, target[0]), flat[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_without_values(mode, reduction):
    """Shapes and dtypes alone, forward and backward, of tensors that hold no values."""
    with torch.device("meta") if mode == "meta" else torch._subclasses.FakeTensorMode():
        hidden = torch.empty(2, 7, 8, dtype=torch.float16, requires_grad=True)
        weight = torch.empty(30, 8, dtype=torch.float16, requires_grad=True)
        target = torch.zeros(2, 7, dtype=torch.int64)
        loss, losses = linear_cross_entropy(hidden, weight, target, reduction=reduction, return_losses=True)
        dhidden, dweight = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert losses.shape == (2, 7) and losses.dtype == loss.dtype == torch.float32
    assert loss.shape == ((2, 7) if reduction == "none" else ())
    assert dhidden.shape == hidden.shape and dweight.shape == weight.shape
    assert dhidden.dtype == dweight.dtype == torch.float16


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "hidden must be float32"),
        ({"hidden": torch.ones(2, 3).half()}, TypeError, "weight must be torch.float16, as hidden is"),
        ({"weight": torch.ones(5, 4)}, ValueError, r"weight must be \[V, C\] with C = 3"),
        ({"target": torch.zeros(2)}, TypeError, r"target must be torch.int64.*try target.long\(\)"),
        ({"target": torch.zeros(3).long()}, ValueError, r"target must have shape \(2,\)"),
        ({"target": torch.tensor([1, 5])}, ValueError, r"target must be in \[0, 5\) or ignore_index.*got 5"),
        ({"target": torch.tensor([1, -1])}, ValueError, "got -1"),
        ({"weight": [1.0]}, TypeError, "weight must be a tensor, got list"),
        ({"target": None}, TypeError, "target must be a tensor, got NoneType"),
        ({"bias": [1.0]}, TypeError, "bias must be a tensor or None, got list"),
        ({"token_weight": 1.0}, TypeError, "token_weight must be a tensor or None, got float"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
        ({"vocab_range": 5}, TypeError, r"vocab_range must be a pair of ints \(start, stop\) or None, got 5"),
        ({"vocab_range": (0.0, 5.0)}, TypeError, "the start of vocab_range must be an int, got float"),
        ({"vocab_range": (2, 6)}, ValueError, "vocab_range must be 0 <= start < stop <= 5"),
        ({"vocab_range": (2, 4)}, ValueError, r"target must be in \[2, 4\)"),
        ({"token_weight": torch.ones(3)}, ValueError, r"token_weight must have shape \(2,\)"),
        ({"token_weight": torch.ones(2).long()}, TypeError, "token_weight must be floating"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'none', 'sum', 'mean', got 'max'"),
        ({"extra_memory": -0.1}, ValueError, r"extra_memory must be a share.*got -0.1; try 1"),
        ({"extra_memory": float("nan")}, ValueError, "extra_memory must be a finite number"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[V\] with V = 5.*got \(4,\)"),
        ({"bias": torch.ones(5).half()}, TypeError, "bias must be torch.float32, as hidden is"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be from 0 to 1, got 1.5"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive finite number, got 0.0"),
        ({"z_loss": -1e-4}, ValueError, "z_loss must be at least 0, got -0.0001"),
        ({"z_loss": "small"}, TypeError, "z_loss must be a number, got str"),
        ({"backend": "sdpa"}, NotImplementedError, "no sdpa backend; this op has"),
    ],
    ids=lambda value: None,
)
def test_errors(arguments, error, message):
    defaults = {"hidden": torch.ones(2, 3), "weight": torch.ones(5, 3), "target": torch.tensor([0, 1])}
    # Parameters were made on the CPU, where the values of targets are checked.
    given = {
        name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in {**defaults, **arguments}.items()
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_out_of_range_has_an_infinite_loss_where_it_is_not_checked(backend):
    hidden, weight = torch.randn(2, 4), torch.randn(6, 4)
    target = torch.tensor([1, 6])
    flags = (False,) * 5
    ours = linear_cross_entropy_op(
        hidden, weight, None, target, torch.ones(2), 0, 6, *PLAIN, *flags, 0.0, backend
    )[0]
    expected = loss_of_reference(hidden, weight, target, reduction="none")
    assert ours[1] == expected[1] == torch.inf
    torch.testing.assert_close(ours[0], expected[0])


# ---- compiled for chips that are not here


def test_triton_compiles_for_sm80_and_sm90():
    """The benchmark's shape; each loss by itself and a share of the logits in memory; sizes of no vector."""
    calls = []
    for arch in (80, 90):
        calls += benchmark_calls("linear_cross_entropy", arch)
        for N, C, V, options in (
            (2176, 640, 58240, {"reduction": "none", "extra_memory": 0.5}),
            (133, 24, 101, {}),
        ):
            tensors = meta(N, C, grad=True), meta(V, C, grad=True), meta(N, dtype=torch.int64)
            calls.append(Call("linear_cross_entropy", tensors, options, arch))
        for dtype in (torch.bfloat16, torch.float32):
            N, C, V = 2176, 640, 58240
            tensors = meta(N, C, dtype=dtype, grad=True), meta(V, C, dtype=dtype, grad=True)
            options = {
                "bias": meta(V, dtype=dtype, grad=True), "softcap": 30.0, "z_loss": 1e-4,
                "label_smoothing": 0.1, "return_predicted_tokens": True,
            }  # fmt: skip
            calls.append(Call("linear_cross_entropy", (*tensors, meta(N, dtype=torch.int64)), options, arch))
    assert_clean(compile_calls(calls))


@pytest.mark.parametrize("backend", [None, "chunked"])
def test_a_bias_of_any_stride(backend):
    """The kernel read past what is not contiguous."""
    hidden, weight, target = torch.randn(5, 4), torch.randn(33, 4), torch.tensor([0, 32, 7, 1, 9])
    bias = torch.randn(33, 2)[:, 0]
    loss = linear_cross_entropy(hidden, weight, target, bias=bias, backend=backend)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ weight.T + bias, target))
