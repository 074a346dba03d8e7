# SPDX-License-Identifier: Apache-2.0
"""layer_norm: the reference by hand and by properties, then every backend against it."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cogview_kernels import _backends, _device, layer_norm
from cogview_kernels._norms.rows import GPU_MAX_WIDTH
from cogview_kernels.layer_norm.reference import layer_norm_reference
from tests.helpers import cuda_compile
from tests.helpers.tolerance import GRADIENT, OUTPUT, assert_within_budget, judge
from tests.helpers.triton_compile import Call, assert_norms_fit, benchmark_calls, compile_calls, meta

BACKENDS = ["cpu", "triton", "cuda"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MODES = ["row", "tensor", None]

# name: (shape, which parameters there are, their dtype if not that of x). A CPU vector has 4, 8 or 16 lanes,
# a row is summed in four sets of them; the CPU's backward deals rows by 16, from 1,024 rows in 64 chunks.
CASES = {
    "one": ((1, 1), "weight and bias", None),
    "vector": ((12, 16), "weight and bias", None),
    "past_a_vector": ((2, 3, 3, 17), "weight and bias", torch.float32),
    "four_vectors_and_a_bit": ((17, 4 * 16 + 5), "weight", None),
    "one_dimension": ((40,), "bias", None),
    "no_parameters": ((5, 33), "", None),
    "two_tiles_of_rows_and_a_bit": ((37, 2 * 128 + 9), "weight and bias", torch.float32),
    "many_rows": ((1024 + 33, 8), "weight and bias", None),
}


def make_case(name: str, dtype: torch.dtype, device: torch.device):
    """``(x, weight, bias), dy``: rows of several scales, with means of their own."""
    shape, which, parameter_dtype = CASES[name]
    x = torch.randn(shape) * torch.rand(*shape[:-1], 1).add(0.2) + torch.randn(*shape[:-1], 1)
    parameters = [
        torch.randn(shape[-1]).to(parameter_dtype or dtype).to(device) if part in which else None
        for part in ("weight", "bias")
    ]
    return (x.to(dtype).to(device), *parameters), torch.randn(shape).to(dtype).to(device)


def with_gradients(function, inputs, dy, **arguments):
    """The output, and the gradient of each input (None where there is none)."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y = function(*leaves, **arguments)
    gradients = iter(torch.autograd.grad(y, [x for x in leaves if x is not None], dy))
    return [y.detach(), *(None if x is None else next(gradients) for x in leaves)]


def check(backend, inputs, dy, **arguments):
    """Output and gradients of a backend are within the budget; returns its output."""
    ours = with_gradients(layer_norm, inputs, dy, backend=backend, **arguments)
    reference = lambda dy, *inputs: with_gradients(layer_norm_reference, inputs, dy, **arguments)  # noqa: E731
    truth, eager = judge(reference, [dy, *inputs])
    for name, x, a, e, t in zip(
        ("y", "dx", "dweight", "dbias"), (dy, *inputs), ours, eager, truth, strict=True
    ):
        if a is not None:
            factor = GRADIENT if name.startswith("d") else OUTPUT
            assert_within_budget(a, e, t, dtype=x.dtype, factor=factor, name=name)
    return ours[0]


# ---- the reference


def test_reference_by_hand():
    # Peak 8 leaves rows as they are; mean 4, variance 16.
    x = torch.tensor([[8.0, 0.0], [0.0, 8.0]], dtype=torch.float64)
    weight, bias = torch.tensor([2.0, 3.0]).double(), torch.tensor([1.0, -1.0]).double()
    y = layer_norm_reference(x, weight, bias, eps=9.0)
    expected = torch.tensor([[2 * 0.8 + 1, -3 * 0.8 - 1], [-2 * 0.8 + 1, 3 * 0.8 - 1]], dtype=torch.float64)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "none"])
def test_none_equals_torch(parameters):
    x = torch.randn(3, 4, 9, dtype=torch.float64)
    weight = torch.randn(9, dtype=torch.float64) if parameters in ("both", "weight") else None
    bias = torch.randn(9, dtype=torch.float64) if parameters in ("both", "bias") else None
    expected = F.layer_norm(x, (9,)) * (1 if weight is None else weight) + (0 if bias is None else bias)
    torch.testing.assert_close(layer_norm_reference(x, weight, bias, pb_relax=None), expected)


@pytest.mark.parametrize("mode", MODES)
def test_peak_only_changes_eps(mode):
    x = torch.randn(6, 11, dtype=torch.float64) * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    peak = {"row": x.abs().amax(-1, keepdim=True), "tensor": x.abs().amax(), None: torch.tensor(8.0)}[mode]
    d = x - x.mean(-1, keepdim=True)
    expected = d / (d.square().mean(-1, keepdim=True) + 1e-5 * (peak / 8) ** 2).sqrt()
    torch.testing.assert_close(layer_norm_reference(x, pb_relax=mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_reference_gradient(mode):
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    # eps is so small that the maximum's own derivative, which is left out on purpose, does not show.
    call = lambda *a: layer_norm_reference(*a, eps=1e-9, pb_relax=mode)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight, bias))


@pytest.mark.parametrize("mode", ["row", "tensor"])
def test_the_peak_is_a_constant_to_the_gradient(mode):
    x = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(1, 7, dtype=torch.float64)
    ours = torch.autograd.grad(layer_norm_reference(x, eps=5.0, pb_relax=mode), x, dy)[0]
    effective = 5.0 * float(x.detach().abs().max() / 8) ** 2
    plain = torch.autograd.grad(F.layer_norm(x, (7,), eps=effective), x, dy)[0]
    torch.testing.assert_close(ours, plain)


def test_where_the_modes_agree_and_differ():
    """A row is damped by sqrt(var / (var + eps (peak / 8)^2)): by nothing if its variance is large."""
    torch.manual_seed(1)
    unit = torch.randn(4, 256, dtype=torch.float64)
    unit = (unit - unit.mean(-1, keepdim=True)) / unit.std(-1, keepdim=True, unbiased=False)
    damping = {}
    for case, x in {
        "alike": unit,
        "small row of a large tensor": torch.cat([unit[:1] * 1e-3, unit[1:]]),
        "small tensor": unit * 1e-3,
        "almost constant": 100 + unit * 1e-2,
    }.items():
        for mode in MODES:
            damping[case, mode] = layer_norm_reference(x, pb_relax=mode)[0].std(unbiased=False).item()
    peak = unit.abs().max().item()
    damped = lambda variance, peak: math.sqrt(variance / (variance + 1e-5 * (peak / 8) ** 2))  # noqa: E731
    for mode in MODES:
        assert damping["alike", mode] == pytest.approx(1, abs=1e-5)
    row_peak = 1e-3 * unit[0].abs().max().item()
    assert damping["small row of a large tensor", "row"] == pytest.approx(damped(1e-6, row_peak), rel=1e-9)
    assert damping["small row of a large tensor", "row"] > 0.99999
    peak = unit[1:].abs().max().item()
    assert damping["small row of a large tensor", "tensor"] == pytest.approx(damped(1e-6, peak), rel=1e-9)
    assert damping["small row of a large tensor", "tensor"] < 0.7
    assert damping["small row of a large tensor", None] == pytest.approx(damped(1e-6, 8), rel=1e-9)
    assert damping["small tensor", "tensor"] > 0.99999 and damping["small tensor", None] < 0.4
    assert damping["almost constant", "row"] < 0.3 and damping["almost constant", None] > 0.9


def extreme_rows(dtype: torch.dtype) -> torch.Tensor:
    """The largest values with and without sign changes, constants, one outlier, subnormals, zeros."""
    limit, tiny = torch.finfo(torch.float16).max, torch.finfo(dtype).smallest_normal
    noise = torch.randn(40, dtype=torch.float64)
    rows = torch.zeros(9, 40, dtype=torch.float64)
    rows[0, ::2], rows[0, 1::2] = limit, -limit
    rows[1] = limit
    rows[2], rows[2, 11] = noise, limit
    rows[3] = noise * limit / 16
    rows[4] = noise * limit * 1e-4
    rows[5] = -0.1
    rows[6] = noise * tiny / 8
    rows[7], rows[7, :20] = limit, -limit
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_reference_of_extreme_rows_is_finite(mode, dtype):
    x = extreme_rows(dtype)
    truth = layer_norm_reference(x.double(), pb_relax=mode)
    y = layer_norm(x, pb_relax=mode, backend="reference")
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), truth, atol=2e-3, rtol=8e-3)


def test_half_types_are_widened():
    x, weight = torch.randn(5, 33).bfloat16(), torch.randn(33)
    y = layer_norm(x, weight, backend="reference")
    assert torch.equal(y, layer_norm_reference(x.float(), weight).bfloat16())


# ---- every backend against the reference


@pytest.mark.budget
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(backend, dtype, case, mode, backend_device):
    if case == "many_rows" and backend != "cpu":
        pytest.skip("1,024 rows are a boundary of the CPU's backward alone, and slow in Triton's interpreter")
    inputs, dy = make_case(case, dtype, backend_device(backend))
    check(backend, inputs, dy, pb_relax=mode)


@pytest.mark.budget
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_rows(backend, dtype, mode, backend_device):
    """Finite and right, each row judged by itself."""
    x = extreme_rows(dtype)
    if backend == "triton" and dtype == torch.bfloat16:
        x[6] *= 2**20  # the interpreter's bf16 has no subnormals
    y = layer_norm(x.to(backend_device(backend)), pb_relax=mode, backend=backend).cpu()
    reference = lambda x: layer_norm_reference(x, pb_relax=mode).unbind()  # noqa: E731
    for r, (e, t) in enumerate(zip(*reversed(judge(reference, [x], compute=torch.float32)), strict=True)):
        assert_within_budget(y[r], e, t, dtype=dtype, name=f"row {r}")


@pytest.mark.parametrize("mode", ["row", "tensor"])
@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_to_the_ends_of_its_range(backend, magnitude, mode, backend_device):
    """The squares of these numbers are zero or infinite in float32."""
    x = torch.linspace(-1, 1, 40, dtype=torch.float64).expand(2, 40) * magnitude
    y = layer_norm(x.float().to(backend_device(backend)), pb_relax=mode, backend=backend).cpu()
    truth = layer_norm_reference(x.float().double(), pb_relax=mode)
    torch.testing.assert_close(y.double(), truth, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_extreme_float16_rows_are_finite(backend, mode, backend_device):
    x = extreme_rows(torch.float16).to(backend_device(backend))
    weight, bias = torch.ones(2, 40, device=x.device)
    _, dx, dweight, dbias = with_gradients(
        layer_norm,
        (x.float(), weight, bias),
        torch.randn(9, 40, device=x.device),
        pb_relax=mode,
        backend=backend,
    )
    assert all(bool(d.isfinite().all()) for d in (dx, dweight, dbias))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows_give_the_bias(backend, mode, backend_device):
    """The mean is rounded; without a correction plain LayerNorm would blow the rest up to 1.

    Several constants and widths: some sums are exact by luck."""
    for C in (700, 1500, 1537):
        x = torch.tensor([12345.678, 54321.123, 77777.77, 98765.43], device=backend_device(backend))
        x = x[:, None].expand(4, C).contiguous()
        y = layer_norm(x, pb_relax=mode, backend=backend)
        torch.testing.assert_close(y, torch.zeros_like(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_others(backend, backend_device):
    x = torch.randn(33, 100, device=backend_device(backend))
    for mode in ("row", None):
        y = layer_norm(x, pb_relax=mode, backend=backend)
        assert torch.equal(layer_norm(x[7:9], pb_relax=mode, backend=backend), y[7:9])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_a_row_changes_nothing(backend, backend_device):
    x = torch.randn(8, 200, device=backend_device(backend))
    y = layer_norm(x, backend=backend)
    for factor in (2.0**-60, 2.0**-20, 2.0**13, 2.0**60):
        torch.testing.assert_close(layer_norm(x * factor, backend=backend), y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, backend_device):
    wide = torch.randn(6, 5, 2, 24, device=backend_device(backend))
    weight = torch.randn(48, device=wide.device)[::2]
    for x in (
        wide[:, :, 1],
        wide.transpose(0, 1)[..., 0, :],
        wide.transpose(-1, 2).contiguous().transpose(-1, 2),
    ):
        y = layer_norm(x, weight, pb_relax=None, backend=backend)
        torch.testing.assert_close(y, F.layer_norm(x, (24,), weight))


@pytest.mark.budget
@pytest.mark.parametrize("C", [511, 512, 513, 640, 641, 2048, 2049, 2560, 3000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_widths_at_the_edges_of_pieces(backend, C, backend_device):
    inputs = [t.to(backend_device(backend)) for t in (torch.randn(24, C) + 1, *torch.randn(2, C))]
    check(backend, inputs, torch.randn(24, C, device=inputs[0].device))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, shape, mode, backend_device):
    x = torch.randn(shape, device=backend_device(backend))
    weight, bias = torch.randn(2, shape[-1], device=x.device)
    y, dx, dweight, dbias = with_gradients(
        layer_norm, (x, weight, bias), torch.randn_like(x), pb_relax=mode, backend=backend
    )
    assert y.shape == dx.shape == shape and not dweight.any() and not dbias.any()


def test_triton_takes_the_maximum_over_many_programs(monkeypatch, backend_device):
    device = backend_device("triton")
    # A program for each row; one load is of 256 maxima.
    monkeypatch.setattr(_device, "INTERPRETED", _device.Properties("many", (9, 0), 257))
    x = torch.randn(257, 4, device=device) * 1e-3
    x[256] *= 1e3
    expected = layer_norm_reference(x, pb_relax="tensor")
    torch.testing.assert_close(layer_norm(x, pb_relax="tensor", backend="triton"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits_on_any_number_of_threads(backend, backend_device):
    case = "many_rows" if backend == "cpu" else "two_tiles_of_rows_and_a_bit"
    inputs, dy = make_case(case, torch.float32, backend_device(backend))
    first = with_gradients(layer_norm, inputs, dy, backend=backend)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        second = with_gradients(layer_norm, inputs, dy, backend=backend)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- dispatch


def test_fewer_threads_than_were_asked_for_do_all(backend_device):
    """OpenMP may give fewer; rows that were another's share are then done by who is there."""
    backend_device("cpu")
    script = (
        "import torch\n"
        "from cogview_kernels import layer_norm\n"
        "torch.set_num_threads(4)\n"
        "x = torch.arange(4096.0).view(4096, 1).expand(4096, 300).contiguous() * torch.arange(300)\n"
        "y = layer_norm(x[1:], torch.ones(300), torch.zeros(300), backend='cpu')\n"
        "torch.testing.assert_close(y, y[:1].expand_as(y), atol=1e-4, rtol=1e-4)\n"
        "assert y[0, -1] > 1\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "OMP_THREAD_LIMIT": "1"})


@pytest.mark.budget
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, instruction_set):
    instruction_set(isa)
    for dtype in DTYPES:
        for case in ("past_a_vector", "four_vectors_and_a_bit"):
            inputs, dy = make_case(case, dtype, torch.device("cpu"))
            check("cpu", inputs, dy)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_rows_too_wide_for_a_gpu_block(backend, backend_device, monkeypatch):
    device = backend_device(backend)
    widest, wide = (torch.randn(1, GPU_MAX_WIDTH + more, device=device) for more in (0, 1))
    torch.testing.assert_close(
        layer_norm(widest, pb_relax=None, backend=backend), F.layer_norm(widest, widest.shape[-1:])
    )
    message = f"the {backend} backend holds a row in registers and takes x of at most 4096 columns, got 4097"
    with pytest.raises(NotImplementedError, match=message):
        layer_norm(wide, backend=backend)
    # Without backend= they go to the next one that takes them.
    monkeypatch.setattr(_backends, "_preference", lambda device: (backend, "reference"))
    monkeypatch.setattr(_backends, "_candidates", {})
    monkeypatch.setattr(_backends, "_passed", {})
    torch.testing.assert_close(layer_norm(wide, pb_relax=None), F.layer_norm(wide, wide.shape[-1:]))


def test_float64_goes_to_the_reference():
    x, weight, bias = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((3, 7), 7, 7))
    assert torch.equal(layer_norm(x, weight, bias), layer_norm_reference(x, weight, bias))
    call = lambda *a: layer_norm(*a, eps=1e-9)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight, bias))


# ---- PyTorch integration


@pytest.mark.parametrize("which", ["weight and bias", ""])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, which, backend_device):
    x = torch.randn(2, 5, 8, device=backend_device(backend), requires_grad=True)
    weight, bias = (torch.randn(8, device=x.device, requires_grad=True) if which else None for _ in range(2))
    ops = torch.ops.cogview_kernels
    torch.library.opcheck(ops.layer_norm.default, (x, weight, bias, 1e-5, "row", backend))
    tensors = [None if t is None else t.detach() for t in (torch.randn_like(x), x, weight, bias)]
    stats = torch.rand(2, 10, device=x.device)
    for needs_dweight in (True, False):
        arguments = (*tensors, stats, backend, needs_dweight)
        torch.library.opcheck(ops.layer_norm_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_graph_break(backend, backend_device):
    inputs, dy = make_case("past_a_vector", torch.float32, backend_device(backend))
    function = lambda *a: layer_norm(2 * a[0], *a[1:], backend=backend) + 1  # noqa: E731
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
        ({"bias": torch.ones(1, 3)}, ValueError, r"bias must have shape \(3,\)"),
        ({"weight": torch.ones(3).half()}, TypeError, "weight must be torch.float32, as x is"),
        ({"eps": 0.0}, ValueError, "eps must be a positive finite number, got 0.0"),
        ({"pb_relax": "batch"}, ValueError, "pb_relax must be one of 'row', 'tensor', None, got 'batch'"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
        ({"backend": "sdpa"}, NotImplementedError, "no sdpa backend; this op has"),
    ],
    ids=lambda value: None,
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        layer_norm(**{"x": torch.ones(2, 3), **arguments})


# ---- large tensors, and chips that are not here


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_past_the_caches_are_streamed(dtype):
    """From 4 MiB on the CPU backend stores around the caches; 2,056 columns do not divide into vectors.

    Halves of the rows are stored as usual and give the same bits; sums over rows are sums of both halves'.
    """
    for C in (2048, 2056):
        x, dy = (torch.randn(1100, C).to(dtype) for _ in range(2))
        parameters = torch.randn(2, C).unbind()
        y, dx, *gradients = with_gradients(layer_norm, (x, *parameters), dy, backend="cpu")
        halves = [
            with_gradients(layer_norm, (x[rows], *parameters), dy[rows], backend="cpu")
            for rows in (slice(550), slice(550, 1100))
        ]
        assert torch.equal(y, torch.cat([half[0] for half in halves]))
        assert torch.equal(dx, torch.cat([half[1] for half in halves]))
        sums = [sum(parts) for parts in zip(*(half[2:] for half in halves), strict=True)]
        torch.testing.assert_close(gradients, sums, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("arch", [80, 90])
def test_triton_compiles_for_sm80_and_sm90(arch):
    """The benchmark's shapes; parameters in float32 and none; the other two modes; the widest row."""
    parameters = [meta(64, dtype=torch.float32, grad=True) for _ in range(2)]
    x = meta(64, 64, dtype=torch.float16, grad=True)
    wide = meta(64, GPU_MAX_WIDTH, dtype=torch.float32, grad=True)
    calls = [
        *benchmark_calls("layer_norm", arch),
        Call("layer_norm", (x, *parameters), {"pb_relax": "tensor"}, arch),
        Call("layer_norm", (x,), {"pb_relax": None}, arch),
        Call("layer_norm", (wide,), {"pb_relax": "tensor"}, arch),
    ]
    assert_norms_fit(compile_calls(calls))


@pytest.mark.skipif(bool(cuda_compile.why_not()), reason=cuda_compile.why_not())
@pytest.mark.parametrize("arch", [70, 90])
def test_cuda_compiles_without_spills(arch):
    types = ("float", "__half", "__nv_bfloat16")
    kernels = [f"cogview::norm_abs_max_kernel<{t}>" for t in types]
    for kernel in ("norm_fwd_kernel", "norm_bwd_kernel"):
        kernels += [f"cogview::{kernel}<cogview::NormKind::kLayer, {t}>" for t in types]
    source = '#include "norms/single.cuh"'
    for kernel, report in cuda_compile.compile_kernels(source, kernels, arch).items():
        assert report.spills == 0, (kernel, report)


def test_cuda_in_any_order_of_threads(emulation):
    """A missing barrier would show."""
    inputs, *rest = make_case("two_tiles_of_rows_and_a_bit", torch.float32, torch.device("cpu"))
    function, given = layer_norm, rest[-1] if isinstance(rest[-1], dict) else {}
    results = []
    for order in (0, 7, 8):
        emulation.configure(order=order)
        results.append(with_gradients(function, inputs, rest[0], backend="cuda", pb_relax="tensor", **given))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
