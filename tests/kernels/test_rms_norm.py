# SPDX-License-Identifier: Apache-2.0
"""rms_norm: the reference by hand and by properties, then every backend against it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogview_kernels import rms_norm
from cogview_kernels._norms.rows import GPU_MAX_WIDTH
from cogview_kernels.rms_norm.reference import rms_norm_reference
from tests.helpers import cuda_compile
from tests.helpers.tolerance import GRADIENT, OUTPUT, assert_within_budget, judge
from tests.helpers.triton_compile import Call, assert_norms_fit, compile_calls, meta

BACKENDS = ["cpu", "triton", "cuda"]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16, BF16]
MODES = [None, "row", "tensor"]
ROUND, OFFSET = {"round_before_weight": True}, {"weight_offset": 1.0}

# name: (shape, the weight's dtype ("none" for none, None for that of x), options). A CPU vector has 4, 8 or
# 16 lanes, a row is summed in four sets of them; the CPU's backward deals rows by 16, from 1,024 rows in 64
# chunks.
CASES = {
    "one": ((1, 1), None, {}),
    "vector": ((12, 16), None, OFFSET),
    "past_a_vector": ((2, 3, 3, 17), torch.float32, ROUND),
    "four_vectors_and_a_bit": ((17, 4 * 16 + 5), None, {"pb_relax": "row"}),
    "one_dimension": ((40,), None, {"pb_relax": "tensor"}),
    "no_weight": ((5, 33), "none", OFFSET),
    "two_tiles_of_rows_and_a_bit": ((37, 2 * 128 + 9), torch.float32, {"pb_relax": "tensor"}),
    "many_rows": ((1024 + 33, 8), None, ROUND),
}


def make_case(name: str, dtype: torch.dtype, device: torch.device):
    """``(x, weight), dy, options``: rows of several scales, with means of their own."""
    shape, weight_dtype, options = CASES[name]
    x = torch.randn(shape) * torch.rand(*shape[:-1], 1).add(0.2) + torch.randn(*shape[:-1], 1)
    weight = None
    if weight_dtype != "none":
        weight = torch.randn(shape[-1]).to(weight_dtype or dtype).to(device)
    return (x.to(dtype).to(device), weight), torch.randn(shape).to(dtype).to(device), options


def with_gradients(function, inputs, dy, **options):
    """The output, and the gradient of each input (None where there is none)."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y = function(*leaves, **options)
    gradients = iter(torch.autograd.grad(y, [x for x in leaves if x is not None], dy))
    return [y.detach(), *(None if x is None else next(gradients) for x in leaves)]


def check(backend, inputs, dy, **options):
    """Output and gradients of a backend are within the budget."""
    ours = with_gradients(rms_norm, inputs, dy, backend=backend, **options)
    reference = lambda dy, *inputs: with_gradients(rms_norm_reference, inputs, dy, **options)  # noqa: E731
    dtypes = [x if x is None else x.dtype for x in (dy, *inputs)]
    truth, eager = judge(reference, [dy, *inputs], compute=torch.float32, dtypes=dtypes)
    for name, dtype, a, e, t in zip(("y", "dx", "dweight"), dtypes, ours, eager, truth, strict=True):
        if a is not None:
            factor = OUTPUT if name == "y" else GRADIENT
            assert_within_budget(a, e, t, dtype=dtype, factor=factor, name=name)


# ---- the reference


def gemma(x, weight):
    """As Gemma2RMSNorm and Gemma3RMSNorm of transformers 5.24 write it, with eps 1e-6."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).type_as(x)


def glm(x, weight):
    """As Glm4RMSNorm, GlmImageRMSNorm and LlamaRMSNorm write it."""
    y = x.to(torch.float32)
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def olmo(x, weight):
    """As Olmo2RMSNorm writes it."""
    y = x.to(torch.float32)
    return (weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


# How the models call it.
MODELS = {
    gemma: {"weight_offset": 1.0},
    glm: {"round_before_weight": True},
    olmo: {},
}


def test_reference_by_hand():
    # The mean square is 25 - 9 = 16, and 16 + eps is 25.
    x = torch.tensor([[4.0, -4.0, 0.0, 32**0.5]], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    y = rms_norm_reference(x, weight, eps=9.0)
    torch.testing.assert_close(y, torch.tensor([[0.8, -1.6, 0.0, 0.0]], dtype=torch.float64))
    y = rms_norm_reference(x, weight, eps=9.0, weight_offset=1.0)
    torch.testing.assert_close(y, torch.tensor([[1.6, -2.4, 0.0, 32**0.5 / 5]], dtype=torch.float64))
    assert torch.equal(rms_norm_reference(x, weight_offset=1.0), rms_norm_reference(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_reference_is_what_the_models_compute(model, dtype):
    x, weight = (2 * torch.randn(40, 64)).to(dtype), torch.randn(64)
    for w in (weight, weight.to(dtype)):
        assert torch.equal(rms_norm(x, w, backend="reference", **MODELS[model]), model(x, w).to(dtype))


def test_equals_torch():
    x, weight = torch.randn(3, 4, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(rms_norm_reference(x, weight), F.rms_norm(x, (9,), weight, 1e-6))
    torch.testing.assert_close(rms_norm_reference(x), F.rms_norm(x, (9,), None, 1e-6))


@pytest.mark.parametrize("mode", MODES)
def test_peak_only_changes_eps(mode):
    x = torch.randn(6, 11, dtype=torch.float64) * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    peak = {"row": x.abs().amax(-1, keepdim=True), "tensor": x.abs().amax(), None: torch.tensor(8.0)}[mode]
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3 * (peak / 8) ** 2).sqrt()
    torch.testing.assert_close(rms_norm_reference(x, eps=1e-3, pb_relax=mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_reference_gradient(mode):
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    # eps is so small that the maximum's own derivative, which is left out on purpose, does not show.
    call = lambda *a: rms_norm_reference(*a, eps=1e-9, weight_offset=1.0, pb_relax=mode)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight))


# ---- every backend against the reference


@pytest.mark.budget
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(backend, dtype, case, backend_device):
    if case == "many_rows" and backend != "cpu":
        pytest.skip("1,024 rows are a boundary of the CPU's backward alone, and slow in Triton's interpreter")
    inputs, dy, options = make_case(case, dtype, backend_device(backend))
    check(backend, inputs, dy, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_a_row_is_rounded(backend, dtype, backend_device):
    """The mean square is 25, so the row is divided by 5, and every quotient has to be rounded."""
    device = backend_device(backend)
    x = torch.tensor([[1.0, 7.0, 5.0, -5.0] * 6], dtype=dtype, device=device)
    weight = torch.linspace(1, 2, 24, device=device).to(dtype)
    quotients, wide = (x.double() / 5).to(dtype).double(), weight.double()
    call = lambda **options: rms_norm(x, weight, eps=1e-30, backend=backend, **options).double()  # noqa: E731
    assert torch.equal(call(round_before_weight=True), (quotients * wide).to(dtype).double())
    assert torch.equal(call(), (x.double() / 5 * wide).to(dtype).double())
    assert not torch.equal(call(), call(round_before_weight=True))
    # 1 + weight is not rounded.
    assert torch.equal(call(weight_offset=1.0), (x.double() / 5 * (1 + wide)).to(dtype).double())


def extreme_rows(dtype: torch.dtype) -> torch.Tensor:
    """The largest values with and without sign changes, one outlier, subnormals, zeros."""
    limit, tiny = torch.finfo(torch.float16).max, torch.finfo(dtype).smallest_normal
    noise = torch.randn(40, dtype=torch.float64)
    rows = torch.zeros(6, 40, dtype=torch.float64)
    rows[0, ::2], rows[0, 1::2] = limit, -limit
    rows[1] = limit
    rows[2], rows[2, 11] = noise, limit
    rows[3] = noise * limit * 1e-4
    rows[4] = noise * tiny / 8
    return rows.to(dtype)


@pytest.mark.budget
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_rows(backend, dtype, mode, backend_device):
    """Finite and right, each row judged by itself; gradients of float16 are finite."""
    x = extreme_rows(dtype)
    if backend == "triton" and dtype == torch.bfloat16:
        x[4] *= 2**20  # the interpreter's bf16 has no subnormals
    device = backend_device(backend)
    y = rms_norm(x.to(device), pb_relax=mode, backend=backend).cpu()
    reference = lambda x: rms_norm_reference(x, pb_relax=mode).unbind()  # noqa: E731
    for r, (e, t) in enumerate(zip(*reversed(judge(reference, [x], compute=torch.float32)), strict=True)):
        assert_within_budget(y[r], e, t, dtype=dtype, name=f"row {r}")
    if dtype == torch.float16:
        leaves = x.float().to(device), torch.ones(40, device=device)
        results = with_gradients(
            rms_norm, leaves, torch.randn_like(leaves[0]), pb_relax=mode, backend=backend
        )
        assert all(bool(d.isfinite().all()) for d in results)


@pytest.mark.parametrize("mode", ["row", "tensor"])
@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_to_the_ends_of_its_range(backend, magnitude, mode, backend_device):
    """The squares of these numbers are zero or infinite in float32."""
    x = torch.linspace(-1, 1, 40, dtype=torch.float64).expand(2, 40) * magnitude
    y = rms_norm(x.float().to(backend_device(backend)), pb_relax=mode, backend=backend).cpu()
    truth = rms_norm_reference(x.float().double(), pb_relax=mode)
    torch.testing.assert_close(y.double(), truth, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_rows_that_do_not_depend_on_others(backend, backend_device):
    wide = torch.randn(6, 5, 2, 24, device=backend_device(backend))
    weight = torch.randn(48, device=wide.device)[::2]
    for x in (
        wide[:, :, 1],
        wide.transpose(0, 1)[..., 0, :],
        wide.transpose(-1, 2).contiguous().transpose(-1, 2),
    ):
        y = rms_norm(x, weight, backend=backend)
        torch.testing.assert_close(y, F.rms_norm(x, (24,), weight, 1e-6))
        assert torch.equal(rms_norm(x[1:3], weight, backend=backend), y[1:3])


@pytest.mark.budget
@pytest.mark.parametrize("C", [511, 513, 641, 2560, 3000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_widths_at_the_edges_of_pieces(backend, C, backend_device):
    device = backend_device(backend)
    check(
        backend,
        [torch.randn(5, C, device=device), torch.randn(C, device=device)],
        torch.randn(5, C).to(device),
    )


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, shape, backend_device):
    x = torch.randn(shape, device=backend_device(backend))
    weight = torch.randn(shape[-1], device=x.device)
    y, dx, dweight = with_gradients(rms_norm, (x, weight), torch.randn_like(x), backend=backend)
    assert y.shape == dx.shape == shape and not dweight.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits_on_any_number_of_threads(backend, backend_device):
    case = "many_rows" if backend == "cpu" else "two_tiles_of_rows_and_a_bit"
    inputs, dy, options = make_case(case, torch.float32, backend_device(backend))
    first = with_gradients(rms_norm, inputs, dy, backend=backend, **options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        second = with_gradients(rms_norm, inputs, dy, backend=backend, **options)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.budget
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, instruction_set):
    instruction_set(isa)
    for dtype in DTYPES:
        for case in ("past_a_vector", "four_vectors_and_a_bit"):
            inputs, dy, options = make_case(case, dtype, torch.device("cpu"))
            check("cpu", inputs, dy, **options)


# ---- PyTorch integration


def test_float64_goes_to_the_reference():
    x, weight = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((3, 7), 7))
    assert torch.equal(rms_norm(x, weight), rms_norm_reference(x, weight))
    assert torch.autograd.gradcheck(rms_norm, (x, weight))


@pytest.mark.parametrize("which", ["weight", ""])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, which, backend_device):
    x = torch.randn(2, 5, 8, device=backend_device(backend), requires_grad=True)
    weight = torch.randn(8, device=x.device, requires_grad=True) if which else None
    ops = torch.ops.cogview_kernels
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6, 1.0, True, "row", backend))
    tensors = [None if t is None else t.detach() for t in (torch.randn_like(x), x, weight)]
    stats = torch.rand(1, 10, device=x.device)
    for needs_dweight in (True, False):
        arguments = (*tensors, stats, 1.0, backend, needs_dweight)
        torch.library.opcheck(ops.rms_norm_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_graph_break(backend, backend_device):
    inputs, dy, options = make_case("past_a_vector", torch.float32, backend_device(backend))
    function = lambda *a: rms_norm(2 * a[0], a[1], backend=backend, **options) + 1  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, inputs, dy), with_gradients(function, inputs, dy))


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "x must be float32"),
        (
            {"x": torch.ones(2, 3, dtype=torch.float64), "backend": "cpu"},
            NotImplementedError,
            "the cpu backend takes x in float32, float16 or bfloat16, got torch.float64",
        ),
        ({"x": torch.ones(())}, ValueError, r"x must be \[..., C\] with C of at least 1"),
        ({"x": torch.ones(3, 0)}, ValueError, r"got shape \(3, 0\)"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(3,\)"),
        ({"weight": torch.ones(3).half()}, TypeError, "weight must be torch.float32, as x is"),
        ({"eps": 0.0}, ValueError, "eps must be a positive finite number, got 0.0"),
        ({"weight_offset": float("inf")}, ValueError, "weight_offset must be a finite number, got inf"),
        ({"weight_offset": "1"}, TypeError, "weight_offset must be a number, got str"),
        ({"round_before_weight": None}, TypeError, "round_before_weight must be a bool, True or False"),
        ({"pb_relax": "batch"}, ValueError, "pb_relax must be one of None, 'row', 'tensor', got 'batch'"),
        ({"backend": "sdpa"}, NotImplementedError, "no sdpa backend; this op has"),
    ],
    ids=lambda value: None,
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        rms_norm(**{"x": torch.ones(2, 3), **arguments})


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_rows_too_wide_for_a_gpu_block(backend, backend_device):
    device = backend_device(backend)
    widest, wide = (torch.randn(1, GPU_MAX_WIDTH + more, device=device) for more in (0, 1))
    torch.testing.assert_close(
        rms_norm(widest, backend=backend), F.rms_norm(widest, (GPU_MAX_WIDTH,), None, 1e-6)
    )
    message = f"the {backend} backend holds a row in registers and takes x of at most 4096 columns, got 4097"
    with pytest.raises(NotImplementedError, match=message):
        rms_norm(wide, backend=backend)


# ---- large tensors, and chips that are not here


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_past_the_caches_are_streamed(dtype):
    """From 4 MiB on the CPU backend stores around the caches; 2,056 columns do not divide into vectors.

    Halves of the rows are stored as usual and give the same bits; sums over rows are sums of both halves'.
    """
    for C in (2048, 2056):
        x, dy = (torch.randn(1100, C).to(dtype) for _ in range(2))
        weight = torch.randn(C)
        y, dx, dweight = with_gradients(rms_norm, (x, weight), dy, backend="cpu")
        halves = [
            with_gradients(rms_norm, (x[rows], weight), dy[rows], backend="cpu")
            for rows in (slice(550), slice(550, 1100))
        ]
        assert torch.equal(y, torch.cat([half[0] for half in halves]))
        assert torch.equal(dx, torch.cat([half[1] for half in halves]))
        torch.testing.assert_close(dweight, halves[0][2] + halves[1][2], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("arch", [80, 90])
def test_triton_compiles_for_sm80_and_sm90(arch):
    """The benchmark's width; a weight in float32 under PB-Relax; the widest row."""
    x, weight = meta(64, 2560, grad=True), meta(2560, grad=True)
    calls = [Call("rms_norm", (x, weight), {}, arch)]
    if arch == 90:  # The same pieces and registers: one chip tells.
        narrow, wide = (meta(64, C, dtype=dtype, grad=True) for C, dtype in ((64, F16), (GPU_MAX_WIDTH, F32)))
        relaxed = {"pb_relax": "row", **OFFSET, **ROUND}
        calls += [
            Call("rms_norm", (narrow, meta(64, dtype=F32, grad=True)), relaxed, arch),
            Call("rms_norm", (wide,), {"pb_relax": "tensor"}, arch),
        ]
    assert_norms_fit(compile_calls(calls))


@pytest.mark.skipif(bool(cuda_compile.why_not()), reason=cuda_compile.why_not())
@pytest.mark.parametrize("arch", [70, 90])
def test_cuda_compiles_without_spills(arch):
    types = ("float", "__half", "__nv_bfloat16")
    names = ("norm_fwd_kernel", "norm_bwd_kernel")
    kernels = [f"cogview::{kernel}<cogview::NormKind::kRms, {t}>" for t in types for kernel in names]
    for kernel, report in cuda_compile.compile_kernels('#include "norms/single.cuh"', kernels, arch).items():
        assert report.spills == 0, (kernel, report)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001])
def test_no_nan_is_rounded_to_a_number(bits):
    """Rounded up as a number, the largest NaN would become a zero, and the smallest an infinity."""
    weight = torch.full((40,), bits, dtype=torch.int32).view(torch.float32)
    out = rms_norm(torch.ones(3, 40, dtype=torch.bfloat16), weight, backend="cpu")
    assert out.dtype == torch.bfloat16 and out.isnan().all()
