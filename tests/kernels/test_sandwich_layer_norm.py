# SPDX-License-Identifier: Apache-2.0
"""sandwich_layer_norm: the reference by hand and by properties, then every backend against it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogview_kernels import _dropout, layer_norm, sandwich_layer_norm
from cogview_kernels.layer_norm.reference import layer_norm_reference
from cogview_kernels.sandwich_layer_norm.reference import sandwich_layer_norm_reference
from tests.helpers import cuda_compile
from tests.helpers.tolerance import GRADIENT, OUTPUT, assert_within_budget, judge
from tests.helpers.triton_compile import Call, assert_norms_fit, benchmark_calls, compile_calls, meta

BACKENDS = ["cpu", "triton", "cuda"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NARROW = [torch.float16, torch.bfloat16]  # of a branch on a float32 residual, as autocast gives it
MODES = ["row", "tensor", None]
PARAMETERS = ("post_weight", "post_bias", "pre_weight", "pre_bias")

# name: (shape, parameters that there are, their dtype if not the activations', dropout_p). A CPU vector has
# 4, 8 or 16 lanes, a row is summed in four sets of them; the CPU's backward deals rows by 16, from 1,024 rows
# in 64 chunks.
CASES = {
    "one": ((1, 1), PARAMETERS, None, 0.0),
    "vector": ((12, 16), PARAMETERS, None, 0.5),
    "past_a_vector": ((2, 3, 3, 17), PARAMETERS, torch.float32, 0.0),
    "four_vectors_and_a_bit": ((17, 4 * 16 + 5), ("post_weight", "pre_bias"), None, 0.1),
    "no_parameters": ((5, 33), (), None, 0.0),
    "two_tiles_of_rows_and_a_bit": ((37, 2 * 128 + 9), PARAMETERS, torch.float32, 0.25),
    "many_rows": ((1024 + 33, 8), ("post_bias", "pre_weight"), None, 0.0),
}


def make_case(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    narrow: torch.dtype | None = None,
    normed_dtype: torch.dtype | None = None,
):
    """``(branch, residual, *parameters)``, the two outputs' gradients, and further arguments.

    ``dtype`` is that of all activations but a ``narrow`` branch."""
    shape, which, parameter_dtype, dropout_p = CASES[name]
    branch = torch.randn(shape) * torch.rand(*shape[:-1], 1).add(0.2) + torch.randn(*shape[:-1], 1)
    residual = 2 * torch.randn(shape) + torch.randn(*shape[:-1], 1)
    inputs = [branch.to(narrow or dtype).to(device), residual.to(dtype).to(device)]
    for part in PARAMETERS:
        p = torch.randn(shape[-1]).to(parameter_dtype or narrow or dtype).to(device)
        inputs.append(p if part in which else None)
    douts = [torch.randn(shape).to(of).to(device) for of in (dtype, normed_dtype or dtype)]
    arguments = {"dropout_p": dropout_p, "seed": 2**40 + 3}
    return inputs, douts, arguments | ({"normed_dtype": normed_dtype} if normed_dtype else {})


def with_gradients(function, inputs, douts, **arguments):
    """Both outputs, and the gradient of each input; a gradient of an output that is None is not asked for."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves, **arguments)
    asked = [(y, dy) for y, dy in zip(outputs, douts, strict=True) if dy is not None]
    gradients = iter(
        torch.autograd.grad(
            [y for y, _ in asked],
            [x for x in leaves if x is not None],
            [dy for _, dy in asked],
            allow_unused=True,
        )
    )
    return [*(y.detach() for y in outputs), *(None if x is None else next(gradients) for x in leaves)]


def check(backend, inputs, douts, **arguments):
    """Outputs and gradients of a backend are within the budget."""
    ours = with_gradients(sandwich_layer_norm, inputs, douts, backend=backend, **arguments)
    normed_dtype = arguments.pop("normed_dtype", inputs[1].dtype)

    def reference(*tensors):
        return with_gradients(sandwich_layer_norm_reference, tensors[:-2], tensors[-2:], **arguments)

    dtypes = [inputs[1].dtype, normed_dtype, *(x if x is None else x.dtype for x in inputs)]
    # A narrow branch on a wide residual is computed in float32.
    compute = None if inputs[0].dtype == inputs[1].dtype else torch.float32
    truth, eager = judge(reference, [*inputs, *douts], compute=compute, dtypes=dtypes)
    names = ("residual_out", "normed", "dbranch", "dresidual", *("d" + p for p in PARAMETERS))
    for name, dtype, a, e, t in zip(names, dtypes, ours, eager, truth, strict=True):
        if e is None:  # autograd asked for nothing
            assert a is None or not a.any(), name
        else:
            factor = GRADIENT if name.startswith("d") else OUTPUT
            assert_within_budget(a, e, t, dtype=dtype, factor=factor, name=name)


def keep_mask(rows: int, columns: int, p: float, seed: int, first_row: int = 0) -> torch.Tensor:
    """The common generator's mask, straight from its two functions."""
    row = torch.arange(first_row, first_row + rows)
    words = _dropout.philox(seed, row & 0xFFFFFFFF, row >> 32, torch.zeros_like(row))
    dropout = _dropout.Dropout(p, torch.tensor(seed))
    return _dropout.keep_mask(dropout, (words[0][:, None], words[1][:, None]), torch.arange(columns))


# ---- the reference


def test_equals_torch():
    branch, residual = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    w1, b1, w2, b2 = torch.randn(4, 9, dtype=torch.float64)
    residual_out, normed = sandwich_layer_norm_reference(branch, residual, w1, b1, w2, b2, pb_relax=None)
    expected = residual + F.layer_norm(branch, (9,), w1, b1)
    torch.testing.assert_close(residual_out, expected)
    torch.testing.assert_close(normed, F.layer_norm(expected, (9,), w2, b2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_gradient(mode, dropout_p):
    inputs = [torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs += [torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    # eps is so small that the maximum's own derivative, which is left out on purpose, does not show.
    call = lambda *a: sandwich_layer_norm_reference(  # noqa: E731
        *a, eps=1e-9, pb_relax=mode, dropout_p=dropout_p, seed=5
    )
    assert torch.autograd.gradcheck(call, inputs)


def test_tensor_mode_takes_each_norms_own_maximum():
    branch, residual = torch.randn(2, 4, 16, dtype=torch.float64)
    branch[0] *= 1e-3
    residual[1] *= 1e-3
    residual_out, normed = sandwich_layer_norm_reference(
        branch, residual, None, None, None, None, pb_relax="tensor"
    )

    def by_hand(x):
        return F.layer_norm(x / (x.abs().max() / 8), (16,))

    torch.testing.assert_close(residual_out, residual + by_hand(branch))
    torch.testing.assert_close(normed, by_hand(residual_out))


# ---- dropout


@pytest.mark.parametrize("seed", [0, 7, 2**62 + 12345])
def test_dropout_mask_is_the_generators(seed):
    # A variance near eps without PB-Relax: otherwise LayerNorm hides the factor 1 / (1 - p).
    branch = (torch.rand(6, 50, dtype=torch.float64) + 1) * 1e-3
    residual_out, _ = sandwich_layer_norm_reference(
        branch, torch.zeros_like(branch), None, None, None, None, pb_relax=None, dropout_p=0.4, seed=seed
    )
    dropped = torch.where(keep_mask(6, 50, 0.4, seed), branch / 0.6, 0)
    torch.testing.assert_close(residual_out, F.layer_norm(dropped, (50,)))


def test_dropout_is_keyed_by_row_and_column():
    masks = keep_mask(64, 512, 0.5, seed=3)
    assert not any(torch.equal(masks[0], row) for row in masks[1:])
    assert not torch.equal(masks, keep_mask(64, 512, 0.5, seed=4))
    assert torch.equal(masks[10:20], keep_mask(10, 512, 0.5, seed=3, first_row=10))
    assert torch.equal(masks[:, :100], keep_mask(64, 100, 0.5, seed=3))
    far = keep_mask(4, 512, 0.5, seed=3, first_row=2**32)  # the high half of the row is in the counter
    assert not torch.equal(far, masks[:4])


def test_dropout_keeps_the_expectation():
    p, rows, columns = 0.1, 400, 500
    kept = keep_mask(rows, columns, p, seed=11).double()
    # Five standard deviations of the mean of that many draws.
    assert kept.mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / kept.numel()) ** 0.5)
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / rows) ** 0.5
    assert (kept.mean(1) - (1 - p)).abs().max() < 5 * (p * (1 - p) / columns) ** 0.5


def test_a_seed_repeats_and_none_draws_from_the_default_generator():
    x = torch.randn(3, 40)
    call = lambda seed: sandwich_layer_norm(x, x, None, None, None, None, dropout_p=0.5, seed=seed)[0]  # noqa: E731
    assert torch.equal(call(9), call(torch.tensor(9)))
    torch.manual_seed(1)
    first, second = call(None), call(None)
    torch.manual_seed(1)
    assert torch.equal(call(None), first) and not torch.equal(first, second)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_draws_the_references_mask(backend, seed, backend_device):
    """Forward: what is dropped is equal after LayerNorm. Backward: its gradient is exactly zero."""
    device = backend_device(backend)
    branch = (torch.rand(7, 300, device=device) + 1).requires_grad_()
    keep = keep_mask(7, 300, 0.3, seed).to(device)
    residual_out, _ = sandwich_layer_norm(
        branch, torch.zeros_like(branch), None, None, None, None, dropout_p=0.3, seed=seed, backend=backend
    )
    lowest = residual_out.amin(-1, keepdim=True)
    assert torch.equal(residual_out != lowest, keep)
    (dbranch,) = torch.autograd.grad(residual_out, branch, torch.randn_like(residual_out))
    assert torch.equal(dbranch != 0, keep)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_second_norm_is_that_of_what_was_rounded(dtype, dropout_p, backend_device):
    """Of the rows as residual_out has them; an unrounded one would change every third value."""
    backend_device("cpu")
    branch, residual = (torch.randn(9, 300).to(dtype) for _ in range(2))
    weight, bias = torch.randn(300).to(dtype), torch.randn(300).to(dtype)
    residual_out, normed = sandwich_layer_norm(
        branch, residual, None, None, weight, bias, dropout_p=dropout_p, seed=5, backend="cpu"
    )
    expected = layer_norm(residual_out, weight, bias, backend="cpu")
    assert (normed == expected).float().mean() > 0.98


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_on_the_device_is_the_same_seed(backend, backend_device):
    x = torch.randn(5, 40, device=backend_device(backend))
    call = lambda seed: sandwich_layer_norm(  # noqa: E731
        x, x, None, None, None, None, dropout_p=0.5, seed=seed, backend=backend
    )
    for a, b in zip(call(77), call(torch.tensor(77, device=x.device)), strict=True):
        assert torch.equal(a, b)


# ---- every backend against the reference


@pytest.mark.budget
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(backend, dtype, case, mode, backend_device):
    if case == "many_rows" and backend != "cpu":
        pytest.skip("1,024 rows are a boundary of the CPU's backward alone, and slow in Triton's interpreter")
    inputs, douts, arguments = make_case(case, dtype, backend_device(backend))
    check(backend, inputs, douts, pb_relax=mode, **arguments)


@pytest.mark.budget
@pytest.mark.parametrize(
    ("case", "mode"),
    [("past_a_vector", "row"), ("four_vectors_and_a_bit", None), ("two_tiles_of_rows_and_a_bit", "tensor")],
)
@pytest.mark.parametrize("is_normed_narrow", [False, True])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_narrow_branch_on_a_wide_residual(backend, dtype, is_normed_narrow, case, mode, backend_device):
    normed_dtype = dtype if is_normed_narrow else None
    device = backend_device(backend)
    inputs, douts, arguments = make_case(case, torch.float32, device, dtype, normed_dtype)
    check(backend, inputs, douts, pb_relax=mode, **arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_narrow_branch_and_normed_have_the_bits_of_casts(backend, dtype, dropout_p, mode, backend_device):
    """Of a cast of the branch before the op, and one of ``normed`` after it, forward and backward."""
    inputs, douts, _ = make_case("past_a_vector", torch.float32, backend_device(backend), dtype, dtype)
    arguments = {"backend": backend, "pb_relax": mode, "dropout_p": dropout_p, "seed": 7}

    def with_casts(branch, *others):
        residual_out, normed = sandwich_layer_norm(branch.float(), *others, **arguments)
        return residual_out, normed.to(dtype)

    ours = with_gradients(sandwich_layer_norm, inputs, douts, normed_dtype=dtype, **arguments)
    assert [x.dtype for x in ours[:4]] == [torch.float32, dtype, dtype, torch.float32]
    for a, b in zip(ours, with_gradients(with_casts, inputs, douts), strict=True):
        assert torch.equal(a, b)
    assert ours[1].isfinite().all() and ours[2].any()


@pytest.mark.parametrize("C", [511, 513, 2560, 3000])
def test_triton_widths_at_the_edges_of_pieces(C, backend_device):
    device = backend_device("triton")
    inputs = [t.to(device) for t in (*torch.randn(2, 4, C), *torch.randn(4, C))]
    check("triton", inputs, torch.randn(2, 4, C).to(device).unbind(), dropout_p=0.1, seed=3)


@pytest.mark.parametrize("only", ["residual_out", "normed"])
@pytest.mark.parametrize("case", ["vector", "two_tiles_of_rows_and_a_bit"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_output_alone(backend, case, only, backend_device):
    inputs, douts, arguments = make_case(case, torch.float32, backend_device(backend))
    douts[only == "residual_out"] = None
    check(backend, inputs, douts, **arguments)


@pytest.mark.budget
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_rows(backend, dtype, mode, backend_device):
    """The largest values, constants, an outlier, subnormals and zeros, in the branch and in the residual."""
    limit, tiny = torch.finfo(torch.float16).max, torch.finfo(dtype).smallest_normal
    noise = torch.randn(64, dtype=torch.float64)
    rows = torch.zeros(7, 64, dtype=torch.float64)
    rows[0, ::2], rows[0, 1::2] = limit, -limit
    rows[1] = limit / 2
    rows[2], rows[2, 11] = noise, limit
    rows[3] = noise * limit * 1e-4
    rows[4] = -0.1
    # The interpreter's bf16 has no subnormals.
    rows[5] = noise * tiny * (1e6 if (backend, dtype) == ("triton", torch.bfloat16) else 1 / 8)
    # Beside the largest values a branch's few units are lost in rounding: nothing overflows.
    branch, residual = rows.to(dtype), 0.99 * rows.roll(1, 0).to(dtype)
    device = backend_device(backend)
    ours = sandwich_layer_norm(
        branch.to(device), residual.to(device), None, None, None, None, pb_relax=mode, backend=backend
    )
    post = lambda *x: sandwich_layer_norm_reference(*x, *[None] * 4, pb_relax=mode)[0].unbind()  # noqa: E731
    pre = lambda x: layer_norm_reference(x, pb_relax=mode).unbind()  # noqa: E731
    # The pre norm is judged for the residual that it was given, which is rounded.
    residual_out, normed = (x.cpu() for x in ours)
    for name, output, reference, inputs in (
        ("residual_out", residual_out, post, [branch, residual]),
        ("normed", normed, pre, [residual_out]),
    ):
        truth, eager = judge(reference, inputs, compute=torch.float32)
        for r, (a, e, t) in enumerate(zip(output, eager, truth, strict=True)):
            assert_within_budget(a, e, t, dtype=dtype, name=f"{name} of row {r}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, backend_device):
    wide = torch.randn(6, 5, 2, 24, device=backend_device(backend))
    branch, residual = wide[:, :, 1], wide.transpose(0, 1)[..., 0, :].transpose(0, 1)
    weight = torch.randn(48, device=wide.device)[::2]
    ours = sandwich_layer_norm(branch, residual, weight, None, None, weight, pb_relax=None, backend=backend)
    expected = residual + F.layer_norm(branch, (24,), weight)
    torch.testing.assert_close(ours, (expected, F.layer_norm(expected, (24,), None, weight)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, mode, backend_device):
    inputs = [*torch.randn(2, 0, 3, 5, device=backend_device(backend))]
    inputs += [*torch.randn(4, 5, device=inputs[0].device)]
    results = with_gradients(
        sandwich_layer_norm, inputs, inputs[:2], pb_relax=mode, dropout_p=0.1, seed=1, backend=backend
    )
    assert all(x.shape == (0, 3, 5) for x in results[:4]) and not any(bool(x.any()) for x in results[4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits_on_any_number_of_threads(backend, backend_device):
    case = "many_rows" if backend == "cpu" else "two_tiles_of_rows_and_a_bit"
    inputs, douts, arguments = make_case(case, torch.float32, backend_device(backend))
    call = lambda: with_gradients(sandwich_layer_norm, inputs, douts, backend=backend, **arguments)  # noqa: E731
    threads, first = torch.get_num_threads(), call()
    try:
        torch.set_num_threads(3)
        second = call()
    finally:
        torch.set_num_threads(threads)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.budget
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, instruction_set):
    instruction_set(isa)
    for dtype in DTYPES:
        for case in ("past_a_vector", "four_vectors_and_a_bit"):
            inputs, douts, arguments = make_case(case, dtype, torch.device("cpu"))
            check("cpu", inputs, douts, **arguments)
    for dtype in NARROW:
        for case in ("past_a_vector", "four_vectors_and_a_bit"):
            inputs, douts, arguments = make_case(case, torch.float32, torch.device("cpu"), dtype, dtype)
            check("cpu", inputs, douts, **arguments)


# ---- PyTorch integration


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, backend_device):
    inputs, douts, _ = make_case("vector", torch.float32, backend_device(backend))
    inputs[3] = None
    leaves = [None if x is None else x.requires_grad_() for x in inputs]
    ops, seed = torch.ops.cogview_kernels, torch.tensor(5)
    options = (1e-5, "row", 0.1, seed, backend)
    torch.library.opcheck(ops.sandwich_layer_norm.default, (*leaves, torch.float32, *options))
    tensors = [None if x is None else x.detach() for x in leaves]
    stats = torch.rand(4, 12, device=douts[0].device)
    for dresidual_out, dnormed in (douts, (None, douts[1]), (douts[0], None)):
        torch.library.opcheck(
            ops.sandwich_layer_norm_backward.default,
            (dresidual_out, dnormed, *tensors[:2], stats, *tensors[2:], 0.1, seed, backend, True, False),
        )
    narrow = tensors[0].bfloat16()  # opcheck compares gradients as if they were float32's
    torch.library.opcheck(ops.sandwich_layer_norm.default, (narrow, *tensors[1:], torch.bfloat16, *options))
    for dnormed in (douts[1].bfloat16(), None):
        torch.library.opcheck(
            ops.sandwich_layer_norm_backward.default,
            (douts[0], dnormed, narrow, tensors[1], stats, *tensors[2:], 0.1, seed, backend, True, True),
        )


@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_graph_break(backend, narrow, backend_device):
    case, device = "four_vectors_and_a_bit", backend_device(backend)
    inputs, douts, arguments = make_case(case, torch.float32, device, narrow, narrow)
    function = lambda *a: sandwich_layer_norm(2 * a[0], *a[1:], backend=backend, **arguments)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        with_gradients(compiled, inputs, douts), with_gradients(function, inputs, douts)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_replays_the_mask(backend, backend_device):
    from torch.utils.checkpoint import checkpoint

    inputs, douts, _ = make_case("vector", torch.float32, backend_device(backend))
    function = lambda *a: sandwich_layer_norm(*a, dropout_p=0.5, backend=backend)  # noqa: E731
    results = []
    for call in (function, lambda *a: checkpoint(function, *a, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(with_gradients(call, inputs, douts))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_gives_a_narrow_branch_and_a_wide_residual():
    x, linear = torch.randn(6, 16, requires_grad=True), torch.nn.Linear(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        branch = linear(x)
        residual_out, normed = sandwich_layer_norm(branch, x, None, None, None, None)
    assert branch.dtype == torch.bfloat16 and residual_out.dtype == normed.dtype == torch.float32
    (residual_out + normed).sum().backward()
    assert x.grad is not None and linear.weight.grad is not None


def test_the_branch_is_saved_as_it_came():
    branch, residual = torch.randn(6, 16).bfloat16().requires_grad_(), torch.randn(6, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        residual_out, _ = sandwich_layer_norm(branch, residual, None, None, None, None)
    assert sorted(x.data_ptr() for x in saved if x.shape == branch.shape) == sorted(
        (branch.data_ptr(), residual_out.data_ptr())
    )


# ---- dtypes and errors


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_are_promoted(dtypes, backend):
    if torch.float64 in dtypes and backend == "cpu":
        pytest.skip("kernels take no float64")
    branch, residual = (torch.randn(3, 8).to(dtype) for dtype in dtypes)
    wide = torch.promote_types(*dtypes)
    weight = torch.randn(8).to(wide)
    outputs = sandwich_layer_norm(branch, residual, weight, None, None, weight, backend=backend)
    both = branch.to(wide), residual.to(wide)
    expected = sandwich_layer_norm(*both, weight, None, None, weight, backend=backend)
    assert all(torch.equal(a, b) and a.dtype == wide for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"branch": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "branch must be float32"),
        ({"residual": torch.ones(2, 3, dtype=torch.int32)}, TypeError, "residual must be float32"),
        (
            {"residual": torch.ones(2, 3, dtype=torch.float64), "backend": "cpu"},
            NotImplementedError,
            "the cpu backend takes branch in float32, float16 or bfloat16, got torch.float64",
        ),
        ({"residual": torch.ones(3, 3)}, ValueError, r"shape of branch, \(2, 3\), got \(3, 3\)"),
        ({"branch": torch.ones(2, 0), "residual": torch.ones(2, 0)}, ValueError, "C of at least 1"),
        ({"post_weight": torch.ones(4)}, ValueError, r"post_weight must have shape \(3,\)"),
        ({"pre_bias": torch.ones(3).half()}, TypeError, "pre_bias must be torch.float32, as branch is"),
        ({"eps": -1.0}, ValueError, "eps must be a positive finite number"),
        ({"pb_relax": True}, ValueError, "pb_relax must be one of"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": None}, TypeError, "dropout_p must be a number"),
        ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
        ({"dropout_p": 0.1, "seed": torch.ones(2).long()}, TypeError, r"got torch.int64 \(2,\)"),
        ({"backend": "sdpa"}, NotImplementedError, "no sdpa backend; this op has"),
        (
            {"normed_dtype": torch.float16},
            TypeError,
            "normed_dtype must be None or torch.float32, that of residual_out, got torch.float16; leave it",
        ),
        (
            {"branch": torch.ones(2, 3).bfloat16(), "normed_dtype": torch.float16},
            TypeError,
            "torch.float32, that of residual_out, or torch.bfloat16, that of branch, got torch.float16",
        ),
        (
            {"residual": torch.ones(2, 3).bfloat16(), "normed_dtype": torch.bfloat16},
            TypeError,
            "normed_dtype must be None or torch.float32, that of residual_out, got torch.bfloat16",
        ),
        ({"normed_dtype": "float32"}, TypeError, "normed_dtype must be None or .* got 'float32'"),
    ],
    ids=lambda value: None,
)
def test_errors(arguments, error, message):
    defaults = {"branch": torch.ones(2, 3), "residual": torch.ones(2, 3)}
    defaults |= dict.fromkeys(("post_weight", "post_bias", "pre_weight", "pre_bias"))
    with pytest.raises(error, match=message):
        sandwich_layer_norm(**{**defaults, **arguments})


# ---- large tensors, and chips that are not here


@pytest.mark.parametrize(
    "dtypes",  # of branch and normed, and of the trunk
    [*((dtype, dtype) for dtype in DTYPES), *((dtype, torch.float32) for dtype in NARROW)],
    ids=str,
)
def test_results_past_the_caches_are_streamed(dtypes):
    """From 4 MiB on the CPU backend stores around the caches; 2,056 columns do not divide into vectors.

    Halves of the rows are stored as usual and give the same bits; sums over rows are sums of both halves'.
    """
    for C in (2048, 2056):
        rows = [torch.randn(1100, C).to(dtype) for dtype in dtypes]
        douts = [torch.randn(1100, C).to(dtype) for dtype in dtypes[::-1]]
        parameters = torch.randn(4, C).unbind()

        def of(part, rows=rows, douts=douts, parameters=parameters):
            inputs = [*(x[part] for x in rows), *parameters]
            options = {"normed_dtype": dtypes[0], "backend": "cpu"}
            return with_gradients(sandwich_layer_norm, inputs, [d[part] for d in douts], **options)

        whole, halves = of(slice(None)), [of(slice(550)), of(slice(550, 1100))]
        for all_rows, parts in zip(whole[:4], zip(*(half[:4] for half in halves), strict=True), strict=True):
            assert torch.equal(all_rows, torch.cat(parts))
        sums = [sum(parts) for parts in zip(*(half[4:] for half in halves), strict=True)]
        torch.testing.assert_close(whole[4:], sums, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("arch", [80, 90])
def test_triton_compiles_for_sm80_and_sm90(arch):
    """The benchmark's shapes; dropout with parameters in float32; pb_relax="tensor"; a width of no vector; a
    narrow branch."""

    def call(C, dtype, parameter_dtype, trunk=None, **options):
        rows = [meta(64, C, dtype=of, grad=True) for of in (dtype, trunk or dtype)]
        parameters = [meta(C, dtype=parameter_dtype, grad=True) for _ in range(4)]
        return Call("sandwich_layer_norm", (*rows, *parameters), options, arch)

    dropout = {"dropout_p": 0.1, "seed": 2**40}
    calls = benchmark_calls("sandwich_layer_norm", arch)
    if arch == 90:  # The same pieces and registers: one chip tells.
        calls = [
            *calls,
            call(2560, torch.bfloat16, torch.bfloat16, pb_relax="tensor", **dropout),
            call(2560, torch.float16, torch.float32, **dropout),
            call(4096, torch.float32, torch.float32, **dropout),
            call(1001, torch.float16, torch.float16),
            call(2560, torch.bfloat16, torch.float32, torch.float32, normed_dtype=torch.bfloat16, **dropout),
        ]
    assert_norms_fit(compile_calls(calls))


@pytest.mark.skipif(bool(cuda_compile.why_not()), reason=cuda_compile.why_not())
@pytest.mark.parametrize("arch", [70, 90])
def test_cuda_compiles_without_spills(arch):
    types = [(t, t, t) for t in ("float", "__half", "__nv_bfloat16")]
    types += [("__half", "float", "float"), ("__half", "float", "__half")]
    kinds = [f"cogview::NormKind::kLayer, {b}, {t}, {n}" for b, t, n in types]
    kernels = [f"cogview::sandwich_bwd_kernel<{kind}>" for kind in kinds]
    for passes in ("true, true", "true, false", "false, true"):
        kernels += [f"cogview::sandwich_fwd_kernel<{kind}, {passes}>" for kind in kinds]
    source = '#include "norms/sandwich.cuh"'
    for kernel, report in cuda_compile.compile_kernels(source, kernels, arch).items():
        assert report.spills == 0, (kernel, report)


def test_cuda_in_any_order_of_threads(emulation):
    """A missing barrier would show."""
    inputs, *rest = make_case("two_tiles_of_rows_and_a_bit", torch.float32, torch.device("cpu"))
    function, given = sandwich_layer_norm, rest[-1] if isinstance(rest[-1], dict) else {}
    results = []
    for order in (0, 7, 8):
        emulation.configure(order=order)
        results.append(with_gradients(function, inputs, rest[0], backend="cuda", pb_relax="tensor", **given))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
