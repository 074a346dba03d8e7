# SPDX-License-Identifier: Apache-2.0
"""decode_step: all layers in one call against the references of the ops that they are made of."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from cogview_kernels import LayerStack, ThreeRegionLayout, _extension, decode_step
from cogview_kernels.decode_step import native
from cogview_kernels.decode_step.reference import decode_step_reference
from tests.helpers.stack import random_stack
from tests.helpers.tolerance import assert_within_budget, judge

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
S = 40
LENGTHS = torch.tensor([37, 0, 9])  # with three new tokens the first row is full
LAYOUT = ThreeRegionLayout(torch.tensor([[1, 7, 30, 14], [2, -1, 5, 0], [3, 1, -1, 8]]), 4, 2, 0.7)


def make(T=1, C=64, H=2, dtype=torch.float32, lengths=LENGTHS, **options):
    """Stack, x, and a cache that is NaN where no token stands yet."""
    stack = random_stack(C=C, dtype=dtype, **options)
    B, L = len(lengths), len(stack.layers)
    cache = torch.randn(L, 2, B, H, S, C // H)
    unwritten = torch.arange(S) >= lengths[:, None]
    cache.masked_fill_(unwritten[None, None, :, None, :, None], torch.nan)
    return stack, 2 * torch.randn(B, T, C).to(dtype), cache.to(dtype)


def check(stack, x, cache, lengths=LENGTHS, layout=None, head=None):
    """The result and the whole cache, of which only the places of the new tokens may have changed."""
    T = x.shape[1]
    new = (torch.arange(S) >= lengths[:, None]) & (torch.arange(S) < lengths[:, None] + T)
    written = new[None, None, :, None, :, None].expand_as(cache)

    def reference(x, given, head, *tensors):
        given = given.clone()
        y = decode_step_reference(x, tensors, head, given, lengths, layout, stack.eps, stack.pb_relax)
        return [y, given[written]]

    mine = cache.clone()
    out = decode_step(x, stack, mine, lengths, layout=layout, head=head, backend="cpu")
    truth, eager = judge(reference, [x, cache, head, *stack.tensors])
    assert_within_budget(out, eager[0], truth[0], dtype=x.dtype)
    assert_within_budget(mine[written], eager[1], truth[1], dtype=x.dtype, name="cache")
    torch.testing.assert_close(mine[~written], cache[~written], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [None, LAYOUT], ids=["dense", "regions"])
@pytest.mark.parametrize("T", [1, 3])
def test_error_budget(dtype, layout, T, backend_device):
    backend_device("cpu")
    check(*make(T, dtype=dtype), layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits(dtype, backend_device):
    """Of a part of an embedding's rows, and of columns that are not contiguous."""
    backend_device("cpu")
    head = torch.randn(30, 80).to(dtype)
    for part in (head[5:18, :64], head[:, :64].t().contiguous().t()):
        check(*make(2, dtype=dtype), head=part)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, instruction_set):
    instruction_set(isa)
    check(*make(2))


@pytest.mark.parametrize("pb_relax", ["tensor", None])
@pytest.mark.parametrize(("C", "H"), [(24, 3), (6, 1)])
def test_modes_and_widths_that_no_vector_divides(C, H, pb_relax, backend_device):
    backend_device("cpu")
    check(*make(2, C, H, pb_relax=pb_relax, F=7, layers=3))


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_a_bit(threads, backend_device):
    """Of a step that has work enough for several."""
    backend_device("cpu")
    stack, x, cache = make(20, 96, 3, lengths=torch.tensor([3, 20]), F=300)
    before, caches = torch.get_num_threads(), [cache.clone() for _ in range(2)]
    found = []
    try:
        for count, mine in zip((1, threads), caches, strict=True):
            torch.set_num_threads(count)
            found.append(decode_step(x, stack, mine, torch.tensor([3, 20]), backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found) and torch.equal(*(mine.nan_to_num() for mine in caches))


@pytest.mark.budget
@pytest.mark.parametrize("F", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows(F, dtype):
    """Enough that products go by panels; an MLP of no width adds its bias alone."""
    lengths = torch.arange(40) % (S - 1)
    check(*make(F=F, layers=1, dtype=dtype, lengths=lengths), lengths)


def test_tiles_leave_rows_to_pytorch(monkeypatch):
    """PyTorch multiplies many rows of bfloat16 by tiles."""
    monkeypatch.setattr(_extension.native, "isa", lambda: "amx")
    wide, narrow = random_stack(dtype=torch.bfloat16), random_stack()
    assert not wide.limit(64, 32) and "at most 64 rows in all, got 65" in wide.limit(65, 32)
    assert not narrow.limit(65, 32)


@torch.no_grad()
def test_a_copy_of_a_stack_that_was_used_is_a_stack_of_its_own(backend_device):
    backend_device("cpu")
    stack, x, cache = make()
    expected = decode_step(x, stack, cache.clone(), LENGTHS)
    for copied in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert copied.serial != stack.serial
        assert torch.equal(decode_step(x, copied, cache.clone(), LENGTHS), expected)
        copied.tensors[-1].add_(1)  # the bias of the last norm
        torch.testing.assert_close(decode_step(x, copied, cache.clone(), LENGTHS), expected + 1)
        assert torch.equal(decode_step(x, stack, cache.clone(), LENGTHS), expected)


def test_which_way_a_call_takes(backend_device, monkeypatch):
    backend_device("cpu")
    taken, run = [], _extension.native.decode_step_cpu
    monkeypatch.setattr(_extension.native, "decode_step_cpu", lambda *a: taken.append(1) or run(*a))
    stack, x, cache = make()

    def kernel_runs(x, stack, cache, lengths=LENGTHS):
        taken.clear()
        decode_step(x, stack, cache, lengths)
        return bool(taken)

    many = make(native.MOST_ROWS + 1, lengths=torch.tensor([0]), layers=1)[:2]
    room = torch.zeros(1, 2, 1, 2, native.MOST_ROWS + 1, 32)
    turned = stack.map(lambda t: t.t().contiguous().t())

    class Quantized(torch.Tensor):
        pass

    others = stack.map(lambda t: t.as_subclass(Quantized))
    for _ in range(2):  # the second time from memory
        assert kernel_runs(x, stack, cache)
        assert not kernel_runs(x, others, cache) and not kernel_runs(x, turned, cache)
        assert not kernel_runs(many[1], many[0], room, torch.tensor([0]))
    assert not stack.limit(native.MOST_ROWS, 32)
    for limit, message in (
        (stack.limit(native.MOST_ROWS + 1, 32), "at most 256 rows in all, got 257; use backend='reference'"),
        (stack.limit(1, 257), "takes head sizes up to 256, got 257"),
        (turned.limit(1, 32), "takes plain and contiguous tensors in stack, got a Tensor of strides"),
        (others.limit(1, 32), "got a Quantized"),
        (random_stack(dtype=torch.float64).limit(1, 32), "takes stack in float32, float16 or bfloat16"),
        (stack.map(lambda t: t.to("meta")).limit(1, 32), "serves CPU tensors"),
    ):
        assert message in limit
    arguments = (LENGTHS, None, 1, 1, 0.0, 1, 1e-5, "row", "cpu")
    with pytest.raises(ValueError, match="tensors of stack must be contiguous"):
        torch.ops.cogview_kernels.decode_step(x, turned.tensors, None, cache, *arguments)
    with pytest.raises(NotImplementedError, match="at most 256 rows"):
        decode_step(many[1], many[0], room, torch.tensor([0]), backend="cpu")


@torch.no_grad()
def test_a_stack_sees_new_values_and_survives_new_tensors(backend_device):
    backend_device("cpu")
    stack, x, cache = make()
    weight = stack.layers[0].qkv[0]
    first = decode_step(x, stack, cache, LENGTHS)
    weight.mul_(2)
    assert not torch.equal(decode_step(x, stack, cache, LENGTHS), first)
    weight.div_(2)
    weight.data = torch.empty(1)
    assert torch.equal(decode_step(x, stack, cache, LENGTHS), first)


def test_opcheck_and_compile(backend_device):
    backend_device("cpu")
    stack, x, cache = make()
    arguments = (
        x,
        stack.tensors,
        torch.randn(5, 64),
        cache,
        LENGTHS,
        LAYOUT.pivots,
        4,
        2,
        0.5,
        1,
        1e-5,
        "row",
        "cpu",
    )
    torch.library.opcheck(torch.ops.cogview_kernels.decode_step, arguments)
    compiled = torch.compile(
        lambda x, cache: decode_step(x, stack, cache, LENGTHS), fullgraph=True, backend="aot_eager"
    )
    caches = cache.clone(), cache.clone()
    with torch.no_grad():
        assert torch.equal(compiled(x, caches[0]), decode_step(x, stack, caches[1], LENGTHS))
    assert torch.equal(*(mine.nan_to_num() for mine in caches))


def test_nothing_to_read_and_no_derivative(backend_device):
    backend_device("cpu")
    stack, x, cache = make()
    before = cache.clone()
    assert decode_step(x[:, :0], stack, cache, LENGTHS).shape == (3, 0, 64)
    assert decode_step(x[:0], stack, cache[:, :, :0], LENGTHS[:0]).shape == (0, 1, 64)
    assert decode_step(x, stack, cache.clone(), LENGTHS, head=torch.ones(0, 64)).shape == (3, 1, 0)
    torch.testing.assert_close(cache, before, rtol=0, atol=0, equal_nan=True)
    for tensor in (x, stack.layers[0].qkv[0]):
        tensor.requires_grad_()
        with pytest.raises(NotImplementedError, match="no derivative; call it inside torch"):
            decode_step(x, stack, cache, LENGTHS, backend="reference")
        with torch.no_grad():
            decode_step(x, stack, cache, LENGTHS)
        tensor.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("by_name", [False, True])
def test_vmap_goes_through_the_list_of_weights(by_name, backend_device):
    backend_device("cpu")
    stack, x, cache = make()
    xs, caches = torch.stack([x, -x]), torch.stack([cache, cache])
    expected = torch.stack([decode_step(y, stack, cache.clone(), LENGTHS) for y in xs])

    def step(x, cache):
        if not by_name:
            return decode_step(x, stack, cache, LENGTHS)
        options = None, 1, 1, 0.0, 1, stack.eps, stack.pb_relax, "cpu"
        return torch.ops.cogview_kernels.decode_step(x, stack.tensors, None, cache, LENGTHS, *options)

    torch.testing.assert_close(torch.func.vmap(step)(xs, caches), expected)
    assert not torch.equal(caches[0].nan_to_num(), caches[1].nan_to_num())
    tensors = [torch.stack([t, t]) for t in stack.tensors]
    torch.testing.assert_close(
        torch.func.vmap(
            lambda x, cache, *t: torch.ops.cogview_kernels.decode_step(
                x, list(t), None, cache, LENGTHS, None, 1, 1, 0.0, 1, stack.eps, stack.pb_relax, "cpu"
            )
        )(xs, caches, *tensors),
        expected,
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autograd_is_told_that_the_cache_was_written(backend, backend_device):
    """A graph that has saved the cache must not go on with the values of later."""
    backend_device("cpu")
    stack, x, cache = make()
    cache = cache.nan_to_num()
    weight = torch.ones_like(cache, requires_grad=True)
    loss = (cache * weight).sum()
    for _ in range(2):  # the second call is prepared
        version = cache._version
        with torch.no_grad():
            decode_step(x, stack, cache, LENGTHS, backend=backend)
        assert cache._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        decode_step(x.clone(), stack, cache.clone(), LENGTHS, backend=backend)


def changed(**parts):
    """A stack whose first layer, or norm after the last one, is another."""
    stack = random_stack()
    final = parts.pop("final_norm", stack.final_norm)
    return LayerStack((stack.layers[0]._replace(**parts), stack.layers[1]), final)


STACK, X, CACHE = random_stack(), torch.ones(3, 1, 64), torch.zeros(2, 2, 3, 2, S, 32)
WIDE = torch.ones(65), torch.ones(64)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, [], CACHE, LENGTHS), {}, TypeError, "stack must be a LayerStack, got list"),
        ((X, STACK, [], LENGTHS), {}, TypeError, "cache must be a tensor, got list"),
        ((X.long(), STACK, CACHE, LENGTHS), {}, TypeError, "x must be float32"),
        ((X[0], STACK, CACHE, LENGTHS), {}, ValueError, r"x must have shape \[B, T, C\]"),
        ((X, STACK, CACHE.half(), LENGTHS), {}, TypeError, "cache must have the dtype of x"),
        ((X, STACK, CACHE[:1], LENGTHS), {}, ValueError, r"cache must have shape \[2, 2, 3, H, S, D\]"),
        ((X, STACK, CACHE[..., :31], LENGTHS), {}, ValueError, "with H D = 64"),
        ((X, STACK, CACHE[:, :, :, :, ::2], LENGTHS), {}, ValueError, "cache must be contiguous"),
        ((X, STACK, CACHE, LENGTHS.short()), {}, TypeError, "lengths must be an int32 or int64 tensor"),
        ((X, STACK, CACHE, LENGTHS[:1]), {}, ValueError, r"lengths must have shape \[3\]"),
        ((X, STACK, CACHE, LENGTHS + 3), {}, ValueError, r"lengths must lie in \[0, 39\]"),
        ((X, STACK, CACHE, LENGTHS - 1), {}, ValueError, r"lengths must lie in \[0, 39\]"),
        ((X[:, :0], STACK, CACHE, LENGTHS - 1), {}, ValueError, r"lengths must lie in \[0, 40\]"),
        ((X, changed(qkv=WIDE), CACHE, LENGTHS), {}, ValueError, r"layers\[0\].qkv's weight must have shape"),
        ((X, changed(final_norm=WIDE), CACHE, LENGTHS), {}, ValueError, "final_norm's weight must have"),
        (
            (X, changed(mlp_up=(WIDE[0], None)), CACHE, LENGTHS),
            {},
            TypeError,
            "mlp_up's bias must be a tensor",
        ),
        ((X, random_stack(pb_relax="none"), CACHE, LENGTHS), {}, ValueError, "pb_relax must be one of"),
        ((X, LayerStack((), WIDE), CACHE[:0], LENGTHS), {}, ValueError, "at least one layer"),
        ((X, STACK, CACHE, LENGTHS), {"head": X}, ValueError, r"head must have shape \[V, 64\]"),
        (
            (X, STACK, CACHE, LENGTHS),
            {"head": torch.ones(2, 64).half()},
            TypeError,
            "head must have the dtype",
        ),
        ((X, STACK, CACHE, LENGTHS), {"layout": 1}, TypeError, "layout must be a ThreeRegionLayout"),
        (
            (X, STACK, CACHE, LENGTHS),
            {"layout": ThreeRegionLayout(torch.tensor([[40]] * 3), 4, 2)},
            ValueError,
            r"pivots must lie in \[0, 40\), the cache's size \(-1 pads\), got 40",
        ),
    ],
)
def test_errors(arguments, options, error, message, backend, backend_device):
    if backend == "cpu":
        backend_device("cpu")
    with pytest.raises(error, match=message):
        decode_step(*arguments, **options, backend=backend)
