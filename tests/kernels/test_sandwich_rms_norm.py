# SPDX-License-Identifier: Apache-2.0
"""sandwich_rms_norm: the reference by hand and by properties, then every backend against it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogview_kernels import rms_norm, sandwich_rms_norm
from cogview_kernels.rms_norm.reference import rms_norm_reference
from cogview_kernels.sandwich_rms_norm.reference import sandwich_rms_norm_reference
from tests.helpers import cuda_compile
from tests.helpers.tolerance import GRADIENT, OUTPUT, assert_within_budget, judge
from tests.helpers.triton_compile import Call, assert_norms_fit, compile_calls, meta

BACKENDS = ["cpu", "triton", "cuda"]
MODES = [None, "row", "tensor"]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Of branch and residual; narrow branches on a wide residual are what autocast gives.
DTYPES = {"float32": (F32, F32), "float16": (F16, F16), "bfloat16": (BF16, BF16)}
MIXED = {"float16 on float32": (F16, F32), "bfloat16 on float32": (BF16, F32)}
ROUND, OFFSET = {"round_before_weight": True}, {"weight_offset": 1.0}
BOTH, POST, PRE = ("post_weight", "pre_weight"), ("post_weight",), ("pre_weight",)
# A sandwich without a pre_weight ends with the addition.

# name: (shape, weights that there are, their dtype if not the branch's, options). A CPU vector has 4, 8 or 16
# lanes, a row is summed in four sets of them; the CPU's backward deals rows by 16, from 1,024 rows in 64
# chunks.
CASES = {
    "one": ((1, 1), BOTH, None, {}),
    "vector": ((12, 16), BOTH, None, {**OFFSET, "dropout_p": 0.5}),
    "past_a_vector": ((2, 3, 3, 17), BOTH, F32, ROUND),
    "four_vectors_and_a_bit": ((17, 4 * 16 + 5), POST, None, {**OFFSET, "dropout_p": 0.1}),
    "no_post_weight": ((5, 33), PRE, None, {"pb_relax": "row"}),
    "no_weights": ((5, 33), (), None, {"pb_relax": "tensor"}),
    "two_tiles_of_rows_and_a_bit": ((37, 2 * 128 + 9), BOTH, F32, {"pb_relax": "tensor", "dropout_p": 0.25}),
    "many_rows": ((1024 + 33, 8), BOTH, None, ROUND),
}


def make_case(
    name: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    normed_dtype: torch.dtype | None = None,
):
    """``(branch, residual, *weights)``, the two outputs' gradients, and options."""
    shape, which, weight_dtype, options = CASES[name]
    branch = torch.randn(shape) * torch.rand(*shape[:-1], 1).add(0.2) + torch.randn(*shape[:-1], 1)
    residual = 2 * torch.randn(shape) + torch.randn(*shape[:-1], 1)
    inputs = [branch.to(dtypes[0]).to(device), residual.to(dtypes[1]).to(device)]
    for part in BOTH:
        w = torch.randn(shape[-1]).to(weight_dtype or dtypes[0]).to(device)
        inputs.append(w if part in which else None)
    douts = [torch.randn(shape).to(of).to(device) for of in (dtypes[1], normed_dtype or dtypes[1])]
    if inputs[3] is None:
        douts[1] = None
    options = {"seed": 2**40 + 3, **options}
    return inputs, douts, options | ({"normed_dtype": normed_dtype} if normed_dtype else {})


def with_gradients(function, inputs, douts, **options):
    """Both outputs, and the gradient of each input; a gradient of an output that is None is not asked for."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves, **options)
    asked = [(y, dy) for y, dy in zip(outputs, douts, strict=True) if dy is not None]
    gradients = iter(
        torch.autograd.grad(
            [y for y, _ in asked],
            [x for x in leaves if x is not None],
            [dy for _, dy in asked],
            allow_unused=True,
        )
    )
    outputs = (None if y is None else y.detach() for y in outputs)
    return [*outputs, *(None if x is None else next(gradients) for x in leaves)]


def check(backend, inputs, douts, **options):
    """Outputs and gradients of a backend are within the budget.

    A narrow branch on a wide residual is computed in float32. Where all rows are narrow, so is residual_out,
    and what follows from it is judged by eager PyTorch in that dtype."""
    ours = with_gradients(sandwich_rms_norm, inputs, douts, backend=backend, **options)
    normed_dtype = options.pop("normed_dtype", inputs[1].dtype)

    def reference(*tensors):
        return with_gradients(sandwich_rms_norm_reference, tensors[:4], tensors[4:], **options)

    dtypes = [inputs[1].dtype, normed_dtype, *(x if x is None else x.dtype for x in inputs)]
    compute = None if inputs[0].dtype == inputs[1].dtype else F32
    truth, eager = judge(reference, [*inputs, *douts], compute=compute, dtypes=dtypes)
    names = ("residual_out", "normed", "dbranch", "dresidual", "dpost_weight", "dpre_weight")
    for name, dtype, a, e, t in zip(names, dtypes, ours, eager, truth, strict=True):
        if e is None:  # there is no such thing, or autograd asked for nothing
            assert a is None or not a.any(), name
        else:
            factor = GRADIENT if name.startswith("d") else OUTPUT
            assert_within_budget(a, e, t, dtype=dtype, factor=factor, name=name)


# ---- the reference


def test_equals_torch():
    branch, residual = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    post, pre = torch.randn(2, 9, dtype=torch.float64)
    residual_out, normed = sandwich_rms_norm_reference(branch, residual, post, pre)
    expected = residual + F.rms_norm(branch, (9,), post, 1e-6)
    torch.testing.assert_close(residual_out, expected)
    torch.testing.assert_close(normed, F.rms_norm(expected, (9,), pre, 1e-6))
    alone, none = sandwich_rms_norm_reference(branch, residual, post)
    assert torch.equal(alone, residual_out) and none is None


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("options", [{"weight_offset": 1.0}, {"round_before_weight": True}, {}], ids=str)
def test_reference_is_what_the_models_compute(options, dtypes):
    """The norm as test_rms_norm.py has it, rounded to the branch's dtype; the sum in the promoted one."""
    branch, residual = (torch.randn(40, 64).to(dtype) for dtype in dtypes)
    post, pre = torch.randn(2, 64).bfloat16()
    residual_out, normed = sandwich_rms_norm(branch, residual, post, pre, backend="reference", **options)
    expected = residual + rms_norm(branch, post, backend="reference", **options)
    assert residual_out.dtype == dtypes[1] and torch.equal(residual_out, expected)
    assert torch.equal(normed, rms_norm(expected, pre.to(dtypes[1]), backend="reference", **options))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_gradient(mode, dropout_p):
    inputs = [torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs += [torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    # eps is so small that the maximum's own derivative, which is left out on purpose, does not show.
    call = lambda *a: sandwich_rms_norm_reference(  # noqa: E731
        *a, eps=1e-9, weight_offset=1.0, pb_relax=mode, dropout_p=dropout_p, seed=5
    )
    assert torch.autograd.gradcheck(call, inputs)


# ---- every backend against the reference


@pytest.mark.budget
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(backend, dtypes, case, backend_device):
    if case == "many_rows" and backend != "cpu":
        pytest.skip("1,024 rows are a boundary of the CPU's backward alone, and slow in Triton's interpreter")
    inputs, douts, options = make_case(case, DTYPES[dtypes], backend_device(backend))
    check(backend, inputs, douts, **options)


@pytest.mark.budget
@pytest.mark.parametrize("case", ["vector", "four_vectors_and_a_bit", "two_tiles_of_rows_and_a_bit"])
@pytest.mark.parametrize("is_normed_narrow", [False, True])
@pytest.mark.parametrize("dtypes", MIXED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_narrow_branch_on_a_wide_residual(backend, dtypes, is_normed_narrow, case, backend_device):
    normed_dtype = MIXED[dtypes][0] if is_normed_narrow else None
    inputs, douts, options = make_case(case, MIXED[dtypes], backend_device(backend), normed_dtype)
    check(backend, inputs, douts, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}, ROUND, OFFSET], ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_narrow_normed_has_the_bits_of_a_cast(backend, dtype, options, mode, backend_device):
    """Forward and backward. With ``round_before_weight`` too rows are rounded to what residual_out has."""
    inputs, douts, _ = make_case("past_a_vector", (dtype, F32), backend_device(backend), dtype)
    options = {"backend": backend, "pb_relax": mode, "seed": 7, **options}

    def with_a_cast(*given):
        residual_out, normed = sandwich_rms_norm(*given, **options)
        return residual_out, normed.to(dtype)

    ours = with_gradients(sandwich_rms_norm, inputs, douts, normed_dtype=dtype, **options)
    assert [x.dtype for x in ours[:4]] == [F32, dtype, dtype, F32]
    for a, b in zip(ours, with_gradients(with_a_cast, inputs, douts), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_dtype_of_a_norm_that_is_left_out(backend, backend_device):
    inputs, douts, options = make_case("four_vectors_and_a_bit", (BF16, F32), backend_device(backend))
    results = [
        with_gradients(sandwich_rms_norm, inputs, douts, backend=backend, normed_dtype=of, **options)
        for of in (None, BF16)
    ]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norms_are_rounded_as_rms_norm_rounds(backend, backend_device):
    """On a residual of zeros the first norm comes out, rounded to the branch's dtype before the weight."""
    device = backend_device(backend)
    branch, weight = torch.randn(7, 300).bfloat16().to(device), torch.randn(300).bfloat16().to(device)
    for options in (ROUND, OFFSET, {}):
        residual_out, normed = sandwich_rms_norm(
            branch, torch.zeros_like(branch), weight, weight, backend=backend, **options
        )
        assert torch.equal(residual_out, rms_norm(branch, weight, backend=backend, **options))
        assert torch.equal(normed, rms_norm(residual_out, weight, backend=backend, **options))
    wide, _ = sandwich_rms_norm(branch, torch.zeros(7, 300).to(device), weight, backend=backend, **ROUND)
    y = rms_norm(branch, backend=backend)
    assert torch.equal(wide, y.float() * weight.float())


@pytest.mark.parametrize("C", [513, 2560])
def test_triton_widths_at_the_edges_of_pieces(C, backend_device):
    device = backend_device("triton")
    inputs = [t.to(device) for t in (*torch.randn(2, 4, C), *torch.randn(2, C))]
    check("triton", inputs, torch.randn(2, 4, C).to(device).unbind(), dropout_p=0.1, seed=3)


@pytest.mark.parametrize("only", ["residual_out", "normed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_output_alone(backend, only, backend_device):
    inputs, douts, options = make_case("past_a_vector", (F32, F32), backend_device(backend))
    douts[only == "residual_out"] = None
    check(backend, inputs, douts, **options)


@pytest.mark.parametrize("seed", [7, -5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_draws_the_references_mask(backend, seed, backend_device):
    """Dropped elements are zeros, forward, and so are their gradients."""
    device = backend_device(backend)
    branch = (torch.rand(7, 300, device=device) + 1).requires_grad_()
    call = lambda backend: sandwich_rms_norm(  # noqa: E731
        branch, torch.zeros_like(branch), None, dropout_p=0.3, seed=seed, backend=backend
    )[0]
    residual_out, expected = call(backend), call("reference")
    assert torch.equal(residual_out != 0, expected != 0) and not expected.all()
    (dbranch,) = torch.autograd.grad(residual_out, branch, torch.randn_like(residual_out))
    assert torch.equal(dbranch != 0, expected != 0)


@pytest.mark.budget
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_rows(backend, dtype, mode, backend_device):
    """The largest values, an outlier, subnormals and zeros, in the branch and in the residual."""
    limit, tiny = torch.finfo(F16).max, torch.finfo(dtype).smallest_normal
    noise = torch.randn(64, dtype=torch.float64)
    rows = torch.zeros(6, 64, dtype=torch.float64)
    rows[0, ::2], rows[0, 1::2] = limit, -limit
    rows[1] = limit / 2
    rows[2], rows[2, 11] = noise, limit
    rows[3] = noise * limit * 1e-4
    # The interpreter's bf16 has no subnormals.
    rows[4] = noise * tiny * (1e6 if (backend, dtype) == ("triton", BF16) else 1 / 8)
    # Beside the largest values a branch's few units are lost in rounding: nothing overflows.
    branch, residual = rows.to(dtype), 0.99 * rows.roll(1, 0).to(dtype)
    device = backend_device(backend)
    one = torch.ones(64, dtype=dtype)
    residual_out, normed = sandwich_rms_norm(
        branch.to(device), residual.to(device), None, one.to(device), pb_relax=mode, backend=backend
    )
    post = lambda *x: sandwich_rms_norm_reference(*x, None, pb_relax=mode)[0].unbind()  # noqa: E731
    pre = lambda x: rms_norm_reference(x, pb_relax=mode).unbind()  # noqa: E731
    # The pre norm is judged for the residual that it was given, which is rounded.
    for name, output, reference, inputs in (
        ("residual_out", residual_out, post, [branch, residual]),
        ("normed", normed, pre, [residual_out.cpu()]),
    ):
        truth, eager = judge(reference, inputs, compute=F32)
        for r, (a, e, t) in enumerate(zip(output.cpu(), eager, truth, strict=True)):
            assert_within_budget(a, e, t, dtype=dtype, name=f"{name} of row {r}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, backend_device):
    wide = torch.randn(6, 5, 2, 24, device=backend_device(backend))
    branch, residual = wide[:, :, 1], wide.transpose(0, 1)[..., 0, :].transpose(0, 1)
    weight = torch.randn(48, device=wide.device)[::2]
    ours = sandwich_rms_norm(branch, residual, weight, weight, backend=backend)
    expected = residual + F.rms_norm(branch, (24,), weight, 1e-6)
    torch.testing.assert_close(ours, (expected, F.rms_norm(expected, (24,), weight, 1e-6)))


@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, weights, backend_device):
    device = backend_device(backend)
    inputs = [*torch.randn(2, 0, 3, 5, device=device), *torch.randn(weights, 5, device=device)]
    douts = [inputs[0], inputs[1] if weights == 2 else None]
    results = with_gradients(sandwich_rms_norm, inputs, douts, dropout_p=0.1, seed=1, backend=backend)
    assert all(x is None or x.shape == (0, 3, 5) for x in results[:4])
    assert not any(bool(x.any()) for x in results[4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits_on_any_number_of_threads(backend, backend_device):
    case = "many_rows" if backend == "cpu" else "two_tiles_of_rows_and_a_bit"
    inputs, douts, options = make_case(case, (F32, F32), backend_device(backend))
    call = lambda: with_gradients(sandwich_rms_norm, inputs, douts, backend=backend, **options)  # noqa: E731
    threads, first = torch.get_num_threads(), call()
    try:
        torch.set_num_threads(3)
        second = call()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.budget
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, instruction_set):
    instruction_set(isa)
    cases = [
        (case, dtypes) for case in ("past_a_vector", "four_vectors_and_a_bit") for dtypes in DTYPES.values()
    ]
    cases += [("vector", d) for d in MIXED.values()]
    for case, dtypes in cases:
        for normed_dtype in {None, dtypes[0]}:
            inputs, douts, options = make_case(case, dtypes, torch.device("cpu"), normed_dtype)
            check("cpu", inputs, douts, **options)


# ---- PyTorch integration


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, dtypes, backend_device):
    inputs, douts, _ = make_case("vector", dtypes, backend_device(backend))
    ops, seed, options = torch.ops.cogview_kernels, torch.tensor(5), (1e-6, 1.0, True, "row", 0.1)
    for pre_weight in (inputs[3], None):
        inputs[3] = pre_weight
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        if dtypes[0] != F32:  # opcheck compares gradients as if they were float32's
            leaves = [None if x is None else x.detach() for x in leaves]
        for normed_dtype in {F32, dtypes[0]}:
            torch.library.opcheck(
                ops.sandwich_rms_norm.default, (*leaves, normed_dtype, *options, seed, backend)
            )
        branch, residual_out, post, pre = (None if x is None else x.detach() for x in leaves)
        stats = torch.rand(1 if pre is None else 2, 12, device=branch.device)
        narrow = douts[1].to(dtypes[0])
        given = [(douts[0], narrow), (None, douts[1]), (douts[0], None)]
        if pre is None:
            given = given[2:]
        for dresidual_out, dnormed in given:
            rows = (dresidual_out, dnormed, branch, residual_out if pre is not None else None)
            arguments = (*rows, stats, post, pre, 1.0, 0.1, seed, backend, True, False)
            torch.library.opcheck(ops.sandwich_rms_norm_backward.default, arguments)


@pytest.mark.parametrize("case", ["past_a_vector", "four_vectors_and_a_bit"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_graph_break(backend, case, backend_device):
    inputs, douts, options = make_case(case, (F32, F32), backend_device(backend))
    function = lambda *a: sandwich_rms_norm(2 * a[0], *a[1:], backend=backend, **options)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        with_gradients(compiled, inputs, douts), with_gradients(function, inputs, douts)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_replays_the_mask(backend, backend_device):
    from torch.utils.checkpoint import checkpoint

    inputs, douts, _ = make_case("vector", (F32, F32), backend_device(backend))
    function = lambda *a: sandwich_rms_norm(*a, dropout_p=0.5, backend=backend)  # noqa: E731
    results = []
    for call in (function, lambda *a: checkpoint(function, *a, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(with_gradients(call, inputs, douts))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_gives_a_narrow_branch_and_a_wide_residual():
    x, linear = torch.randn(6, 16, requires_grad=True), torch.nn.Linear(16, 16)
    with torch.autocast("cpu", BF16):
        branch = linear(x)
        residual_out, normed = sandwich_rms_norm(branch, x, torch.ones(16), torch.ones(16))
    assert branch.dtype == BF16 and residual_out.dtype == normed.dtype == F32
    (residual_out + normed).sum().backward()
    assert x.grad is not None and linear.weight.grad is not None


# ---- dtypes and errors


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtypes", [(F32, BF16), (F16, BF16), (BF16, torch.float64)], ids=str)
def test_other_mixed_dtypes_are_promoted(dtypes, backend):
    if torch.float64 in dtypes and backend == "cpu":
        pytest.skip("kernels take no float64")
    branch, residual = (torch.randn(3, 8).to(dtype) for dtype in dtypes)
    weight, wide = torch.randn(8), torch.promote_types(*dtypes)
    weight = weight.to(torch.float64) if wide == torch.float64 else weight
    outputs = sandwich_rms_norm(branch, residual, weight, weight, backend=backend)
    expected = sandwich_rms_norm(branch.to(wide), residual.to(wide), weight, weight, backend="reference")
    for y, truth in zip(outputs, expected, strict=True):
        assert y.dtype == wide
        torch.testing.assert_close(y, truth, rtol=5e-3 if branch.dtype == F16 else 1e-5, atol=5e-3)


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
        ({"pre_weight": torch.ones(3).half()}, TypeError, "pre_weight must be torch.float32, as branch is"),
        ({"eps": -1.0}, ValueError, "eps must be a positive finite number"),
        ({"weight_offset": None}, TypeError, "weight_offset must be a number, got NoneType"),
        ({"round_before_weight": "yes"}, TypeError, "round_before_weight must be a bool, True or False"),
        ({"pb_relax": True}, ValueError, "pb_relax must be one of"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
        ({"backend": "sdpa"}, NotImplementedError, "no sdpa backend; this op has"),
        (
            {"branch": torch.ones(2, 3).bfloat16(), "normed_dtype": F16},
            TypeError,
            "torch.float32, that of residual_out, or torch.bfloat16, that of branch, got torch.float16",
        ),
        ({"normed_dtype": 16}, TypeError, "normed_dtype must be None or torch.float32, .* got 16; leave it"),
    ],
    ids=lambda value: None,
)
def test_errors(arguments, error, message):
    defaults = {"branch": torch.ones(2, 3), "residual": torch.ones(2, 3), "post_weight": None}
    with pytest.raises(error, match=message):
        sandwich_rms_norm(**{**defaults, **arguments})


# ---- large tensors, and chips that are not here


@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.parametrize("is_normed_narrow", [False, True])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "bfloat16 on float32"])
def test_results_past_the_caches_are_streamed(dtypes, is_normed_narrow, weights):
    """From 4 MiB on the CPU backend stores around the caches.

    Halves of the rows are stored as usual and give the same bits; sums over rows are sums of both halves'.
    """
    kinds = (DTYPES | MIXED)[dtypes]
    rows = [torch.randn(1100, 2048).to(dtype) for dtype in kinds]
    normed_dtype = kinds[0] if is_normed_narrow else kinds[1]
    douts = [torch.randn(1100, 2048).to(kinds[1]), torch.randn(1100, 2048).to(normed_dtype)]
    douts[weights:] = [None] * (2 - weights)
    parameters = torch.randn(weights, 2048).unbind()

    def part(of):
        given = [x[of] for x in rows], [None if d is None else d[of] for d in douts]
        options = {"normed_dtype": normed_dtype, "backend": "cpu"}
        return with_gradients(sandwich_rms_norm, [*given[0], *parameters], given[1], **options)

    whole, halves = part(slice(None)), [part(half) for half in (slice(550), slice(550, 1100))]
    for all_rows, parts in zip(whole[:4], zip(*(half[:4] for half in halves), strict=True), strict=True):
        assert all_rows is None or torch.equal(all_rows, torch.cat(parts))
    sums = [sum(parts) for parts in zip(*(half[4:] for half in halves), strict=True)]
    torch.testing.assert_close(whole[4:], sums, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("arch", [80, 90])
def test_triton_compiles_for_sm80_and_sm90(arch):
    """The benchmark's width; dropout, PB-Relax and weights in float32; no pre norm; a narrow branch."""

    def call(C, dtypes, weights, **options):
        rows = [meta(64, C, dtype=dtype, grad=True) for dtype in dtypes]
        return Call(
            "sandwich_rms_norm",
            (*rows, *(meta(C, dtype=F32, grad=True) for _ in range(weights))),
            options,
            arch,
        )

    dropout = {"dropout_p": 0.1, "seed": 2**40}
    calls = [call(2560, (BF16, BF16), 2)]
    if arch == 90:  # The same pieces and registers: one chip tells.
        calls += [
            call(2560, (BF16, F32), 2, pb_relax="tensor", **dropout, **OFFSET, **ROUND),
            call(2560, (BF16, BF16), 1, **ROUND),
            call(2560, (BF16, F32), 2, normed_dtype=BF16),
            call(4096, (F32, F32), 2, pb_relax="row", **dropout),
        ]
    assert_norms_fit(compile_calls(calls))


@pytest.mark.skipif(bool(cuda_compile.why_not()), reason=cuda_compile.why_not())
@pytest.mark.parametrize("arch", [70, 90])
def test_cuda_compiles_without_spills(arch):
    types = [(b, t, t) for b, t in (("float", "float"), ("__half", "__half"), ("__half", "float"))]
    types += [("__half", "float", "__half")]
    kinds = [f"cogview::NormKind::kRms, {b}, {t}, {n}" for b, t, n in types]
    kernels = [f"cogview::sandwich_bwd_kernel<{kind}>" for kind in kinds]
    for passes in ("true, true", "true, false", "false, true"):
        kernels += [f"cogview::sandwich_fwd_kernel<{kind}, {passes}>" for kind in kinds]
    source = '#include "norms/sandwich.cuh"'
    for kernel, report in cuda_compile.compile_kernels(source, kernels, arch).items():
        assert report.spills == 0, (kernel, report)


def test_cuda_in_any_order_of_threads(emulation):
    """A missing barrier would show."""
    inputs, douts, options = make_case("two_tiles_of_rows_and_a_bit", (F32, F32), torch.device("cpu"))
    results = []
    for order in (0, 7, 8):
        emulation.configure(order=order)
        results.append(with_gradients(sandwich_rms_norm, inputs, douts, backend="cuda", **options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
