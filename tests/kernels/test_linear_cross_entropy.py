# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy: the reference by hand and by properties, then every backend against it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogview_kernels import linear_cross_entropy
from cogview_kernels.linear_cross_entropy import chunked
from cogview_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from tests.helpers.tolerance import GRADIENT, assert_within_budget

BACKENDS = ["chunked"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["none", "sum", "mean"]

# name: (tokens, width, vocabulary, arguments). Chunks are of 16 tokens in these tests.
CASES = {
    "one": (1, 1, 1, {}),
    "below_a_chunk": (15, 8, 33, {}),
    "a_chunk": (16, 24, 70, {"token_weight": True}),
    "past_a_chunk": (17, 24, 70, {"ignored": 5}),
    "two_chunks_and_a_bit": (37, 40, 101, {"ignored": 9, "token_weight": True}),
    "range": (33, 16, 60, {"token_weight": True, "vocab_range": (7, 41)}),
    "padded_tail": (20, 16, 64, {"ignored": 3, "vocab_range": (0, 59)}),
}


@pytest.fixture(autouse=True)
def _chunks_of_16_tokens(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 0)


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
    dloss = torch.linspace(0.5, 2.0, loss.numel()).view(loss.shape).to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, inputs, dloss)


# ---- the reference


def test_reference_by_hand():
    hidden, weight = (
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),
    )
    losses = linear_cross_entropy_reference(hidden, weight, torch.tensor([0, 2]), reduction="none")
    e = torch.e
    torch.testing.assert_close(losses, torch.tensor([e + 2, e**2 + 2]).log() - torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference_equals_torch(reduction):
    (hidden, weight), target, arguments = make_case("past_a_chunk", torch.float64)
    ours = linear_cross_entropy_reference(hidden, weight, target, reduction=reduction, **arguments)
    torch.testing.assert_close(ours, F.cross_entropy(hidden @ weight.T, target, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ["a_chunk", "past_a_chunk", "range"])
def test_reference_gradient(case, reduction):
    (hidden, weight), target, arguments = make_case(case, torch.float64)
    call = lambda h, w: linear_cross_entropy_reference(  # noqa: E731
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
    (hidden, weight), target, arguments = make_case("two_chunks_and_a_bit", dtype)
    arguments["backend"] = backend
    token_weight = arguments["token_weight"]
    losses = linear_cross_entropy(hidden, weight, target, reduction="none", **arguments)
    mean = linear_cross_entropy(hidden, weight, target, **arguments)
    assert losses.dtype == mean.dtype == torch.float32
    torch.testing.assert_close(mean, losses.sum() / token_weight[target != -100].sum())
    plain = linear_cross_entropy(hidden, weight, target, reduction="none", backend=backend)
    torch.testing.assert_close(losses, plain * token_weight)


# ---- every backend against the reference


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(backend, dtype, case, reduction):
    inputs, target, arguments = make_case(case, dtype)
    arguments["reduction"] = reduction
    ours = with_gradients(linear_cross_entropy, inputs, target, backend=backend, **arguments)
    truth = with_gradients(linear_cross_entropy_reference, [x.double() for x in inputs], target, **arguments)
    eager = with_gradients(linear_cross_entropy_reference, inputs, target, **arguments)
    # A sum may be right by luck in eager arithmetic; it is judged by its parts.
    if reduction == "none":
        assert_within_budget(ours[0], eager[0].float(), truth[0], name="loss")
    else:
        parts = linear_cross_entropy(*inputs, target, backend=backend, **{**arguments, "reduction": "none"})
        divisor = arguments.get("token_weight", torch.ones(len(target)))[target != -100].sum()
        torch.testing.assert_close(ours[0], parts.sum() / (divisor if reduction == "mean" else 1))
    assert_within_budget(ours[1], eager[1], truth[1], factor=GRADIENT, name="dhidden")
    assert_within_budget(ours[2], eager[2], truth[2], factor=GRADIENT, name="dweight")


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_logits_are_never_held():
    hidden, weight, target = torch.randn(96, 4), torch.randn(500, 4), torch.randint(0, 500, (96,))
    with LargestTensor() as largest:
        with_gradients(linear_cross_entropy_reference, (hidden, weight), target)
    assert largest.numel == 96 * 500
    for gradients in (False, True):
        with LargestTensor() as largest:
            chunked.linear_cross_entropy_chunked(hidden, weight, target, torch.ones(96), gradients)
        assert largest.numel == 16 * 500


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


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_under_a_loss_scale(backend, scale, reduction):
    """Many tokens and a large vocabulary: gradients of a logit below what float16 holds, unless scaled."""
    hidden, weight = torch.randn(64, 16).half(), (0.1 * torch.randn(3000, 16)).half()
    target = torch.randint(0, 3000, (64,))
    call = lambda f, *xs, **k: torch.autograd.grad(f(*xs, target, **k).mean() * scale, xs)  # noqa: E731
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = call(linear_cross_entropy_reference, *wide)
    eager = call(lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t), *leaves)
    for a, e, t in zip(
        call(linear_cross_entropy, *leaves, reduction=reduction, backend=backend), eager, truth, strict=True
    ):
        assert_within_budget(a, e, t, factor=GRADIENT)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_small_factors_are_applied_last(backend, reduction):
    """1e-4 times a probability of 1/3000 is below float16; times a hidden state of 1000 it no longer is."""
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


# ---- PyTorch integration


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, summed):
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    target, coefficient = torch.randint(0, 30, (20,)), torch.rand(20)
    op = torch.ops.cogview_kernels.linear_cross_entropy.default
    torch.library.opcheck(op, (hidden, weight, target, coefficient, summed, True, backend))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_graph_break(backend, reduction):
    inputs, target, arguments = make_case("two_chunks_and_a_bit", torch.float32)
    arguments |= {"reduction": reduction, "backend": backend}
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        with_gradients(compiled, inputs, target, **arguments),
        with_gradients(linear_cross_entropy, inputs, target, **arguments),
    )


def test_autocast_casts_as_linear_does():
    (hidden, weight), target, _ = make_case("past_a_chunk", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, dhidden, dweight = with_gradients(linear_cross_entropy, (hidden, weight), target)
    assert loss == linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), target)
    assert dhidden.dtype == dweight.dtype == torch.float32


def test_leading_dimensions():
    (hidden, weight), target, _ = make_case("a_chunk", torch.float32)
    flat = linear_cross_entropy(hidden, weight, target, reduction="none")
    shaped = linear_cross_entropy(hidden.view(2, 8, 24), weight, target.view(2, 8), reduction="none")
    torch.testing.assert_close(shaped, flat.view(2, 8))
    torch.testing.assert_close(linear_cross_entropy(hidden[0], weight, target[0]), flat[0])


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
        ({"vocab_range": (2, 6)}, ValueError, "vocab_range must be 0 <= start < stop <= 5"),
        ({"vocab_range": (2, 4)}, ValueError, r"target must be in \[2, 4\)"),
        ({"token_weight": torch.ones(3)}, ValueError, r"token_weight must have shape \(2,\)"),
        ({"token_weight": torch.ones(2).long()}, TypeError, "token_weight must be floating"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'none', 'sum', 'mean', got 'max'"),
        ({"backend": "sdpa"}, NotImplementedError, "no sdpa backend; this op has"),
    ],
    ids=lambda value: None,
)
def test_errors(arguments, error, message):
    defaults = {"hidden": torch.ones(2, 3), "weight": torch.ones(5, 3), "target": torch.tensor([0, 1])}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**defaults, **arguments})


def test_a_target_out_of_range_has_an_infinite_loss_where_it_is_not_checked():
    from cogview_kernels.linear_cross_entropy.autograd import linear_cross_entropy_op

    hidden, weight = torch.randn(2, 4), torch.randn(6, 4)
    target = torch.tensor([1, 6])
    ours = linear_cross_entropy_op(hidden, weight, target, torch.ones(2), False, "chunked")
    reference = linear_cross_entropy_reference(hidden, weight, target, reduction="none")
    assert ours[1] == reference[1] == torch.inf
    torch.testing.assert_close(ours[0], reference[0])
