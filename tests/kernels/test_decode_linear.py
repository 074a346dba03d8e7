# SPDX-License-Identifier: Apache-2.0
"""decode_linear: the kernels against plain PyTorch, which is their reference, and which way a call takes."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
import torch.nn.functional as F

from cogview_kernels import _backends, _extension, decode_linear
from cogview_kernels._triton import Plans
from cogview_kernels.decode_linear import launch_config, native
from cogview_kernels.decode_linear.op import decode_linear_op
from cogview_kernels.decode_linear.reference import decode_linear_reference
from tests.helpers.tolerance import assert_within_budget, judge
from tests.helpers.triton_compile import Call, assert_clean, benchmark_calls, compile_calls, meta

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["cpu", "triton"]


def make(N=1, K=96, O=40, dtype=torch.float32, device="cpu"):
    x, weight, bias = torch.randn(N, K), torch.randn(O, K), 3 * torch.randn(O)
    return [tensor.to(device, dtype) for tensor in (x, weight, bias)]


def check(x, weight, bias, activation, backend="cpu"):
    out = decode_linear(x, weight, bias, activation=activation, backend=backend)
    truth, eager = judge(lambda *t: [decode_linear_reference(*t, activation)], [x, weight, bias])
    assert_within_budget(out, eager[0], truth[0], dtype=x.dtype)
    return out


@pytest.mark.budget
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("N", [1, 2, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_budget(dtype, activation, N, backend, backend_device):
    check(*make(N, 1100, 45, dtype, backend_device(backend)), activation, backend)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_instruction_set(isa, instruction_set):
    """Rows in groups of up to four, the last of which is a part; inputs in runs and in one."""
    instruction_set(isa)
    for dtype in DTYPES:
        for N, K in ((1, 1100), (3, 1100), (6, 300), (7, 1100), (8, 1024), (9, 70)):
            check(*make(N, K, 45, dtype), "gelu_tanh")


@pytest.mark.budget
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
@pytest.mark.parametrize("N", [17, 33, 60, 131])
@pytest.mark.parametrize(("K", "O"), [(1, 5), (33, 37), (70, 64), (2100, 45)])
def test_many_rows(isa, N, K, O, instruction_set, monkeypatch):
    """Panels, blocks and runs of which the last are parts; pairs of inputs across a row's end; bits that do
    not depend on the threads. A decoding step has so many rows."""
    instruction_set(isa)
    monkeypatch.setattr(native, "MOST_ROWS", N)
    for dtype in DTYPES:
        x, weight, bias = make(N, K, O + 1, dtype)
        weight = F.pad(weight, (0, 1), value=torch.nan)[:O, :K]
        out = check(x, weight, bias[:O], "gelu_tanh")
        alone = torch.empty_like(out)
        _extension.native.decode_linear_cpu(x, weight, bias[:O], alone, True, 1)
        assert torch.equal(out, alone)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_nothing(backend, backend_device):
    device = backend_device(backend)
    x, weight, bias = (
        torch.randn(48, 2, 2, device=device).permute(1, 2, 0),
        torch.randn(40, 60, device=device)[3:, 5:53],
        torch.randn(74, device=device)[::2],
    )
    # Triton's kernels leave columns to plain PyTorch.
    for w in (weight, torch.randn(48, 37, device=device).t())[: 1 if backend == "triton" else 2]:
        close = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(decode_linear(x, w, bias, backend=backend), F.linear(x, w, bias), **close)
        torch.testing.assert_close(decode_linear(x, w, backend=backend), F.linear(x, w), **close)
    some, none = torch.randn(2, 5, device=device), torch.empty(0, 5, device=device)
    assert decode_linear(none, some, backend=backend).shape == (0, 2)
    assert decode_linear(some, none, backend=backend).shape == (2, 0)


# The cube of the largest is infinite, as it should be.
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("N", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_of_large_numbers(backend, N, backend_device):
    device = backend_device(backend)
    numbers = [0.0, -0.0, 1e-30, -1e-30, 4, -4, 20, -20, 1e4, -1e4, 1e13, -1e13, 3e38, -3e38, torch.inf]
    bias = torch.tensor(numbers, device=device)
    zero = torch.zeros(N, 1, device=device), torch.zeros(len(bias), 1, device=device)
    out = decode_linear(*zero, bias, activation="gelu_tanh", backend=backend)
    truth = F.gelu(bias, approximate="tanh").expand(N, -1)
    torch.testing.assert_close(out, truth, atol=1e-7, rtol=1e-6)
    nan = torch.full_like(bias, torch.nan)
    assert decode_linear(*zero, nan, activation="gelu_tanh", backend=backend).isnan().all()


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, backend_device):
    arguments = *make(3, device=backend_device(backend)), "gelu_tanh", backend
    torch.library.opcheck(torch.ops.cogview_kernels.decode_linear, arguments)


def test_compile(backend_device):
    backend_device("cpu")
    x, weight, bias = make(3)
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
        ((ONE_ROW, ONES, 0), {}, TypeError, "bias must be a tensor or None, got int"),
        ((ONE_ROW.long(), ONES), {}, TypeError, "x must be float32, float16, bfloat16 or float64"),
        ((torch.ones(()), ONES), {}, ValueError, r"x must be \[..., C\]"),
        ((ONE_ROW, torch.ones(3, 4)), {}, ValueError, r"weight must have shape \[O, 2\].*got \(3, 4\)"),
        ((ONE_ROW, ONES, torch.ones(2)), {}, ValueError, r"bias must have shape \(3,\)"),
        ((ONE_ROW, ONES.half()), {}, TypeError, "weight must have the dtype of x"),
        ((ONE_ROW, ONES, torch.ones(3).half()), {}, TypeError, "bias must have the dtype of x"),
        ((ONE_ROW, ONES.to("meta")), {}, ValueError, "weight must be on the device of x"),
        ((ONE_ROW, ONES), {"activation": "relu"}, ValueError, "activation must be one of None"),
        ((ONE_ROW, ONES), {"backend": "cuda"}, NotImplementedError, "no cuda backend"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        decode_linear(*arguments, **options)


# ---- Triton


@pytest.fixture
def kernels(backend_device, monkeypatch):
    backend_device("triton")
    module = importlib.import_module("cogview_kernels.decode_linear.triton_kernels")
    monkeypatch.setattr(module, "_plans", Plans(module._plan))  # on a GPU, older plans are kept
    return module


@pytest.mark.budget
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_rows(dtype, kernels, device):
    """More outputs than a program has, and a last part of K. What is not written stays NaN."""
    for N in range(1, native.MOST_ROWS + 1):
        check(*make(N, 300, 43, dtype, device), "gelu_tanh", "triton")


# Pieces of 256 numbers in 16 bits, of 128 in float32; turns of ten of them; tiles of 256. Rows that are no
# multiple of 16 bytes.
@pytest.mark.parametrize("K", [1, 7, 127, 128, 129, 256, 257, 2560, 2561])
@pytest.mark.parametrize("N", [1, 3, 9])
def test_edges_of_pieces_and_turns(N, K, kernels, device):
    # Sums in float32, and one rounding: half of a bfloat16's last place is 2^-9 of it.
    for dtype, close in ((torch.float32, (1e-4, 1e-5)), (torch.bfloat16, (1e-3, 2**-8))):
        tensors = make(N, K, 9, dtype, device)
        truth = F.linear(*(tensor.double() for tensor in tensors))
        out = decode_linear(*tensors, backend="triton").double()
        torch.testing.assert_close(out, truth, atol=close[0], rtol=close[1])


@pytest.mark.parametrize("O", [1, 3, 4, 5, 8, 9, 31, 32, 33, 65])
def test_edges_of_the_outputs(O, kernels, device):
    for N in (1, 4, 6):
        x, weight, bias = make(N, 64, O, torch.float16, device)
        out = decode_linear(x, weight, bias, backend="triton")
        truth = F.linear(x.float(), weight.float(), bias.float())
        torch.testing.assert_close(out.float(), truth, atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_twice(dtype, kernels, device):
    for N in (1, 4, 16):
        tensors = make(N, 700, 45, dtype, device)
        first, second = (decode_linear(*tensors, activation="gelu_tanh", backend="triton") for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("N", [1, 9])
def test_nothing_beside_the_tensors_counts(N, kernels, device):
    """NaN before and after the columns of a weight, and where rows of x end. Rows begin at multiples of 16
    bytes with and without it: else a GPU gets another kernel, which sums in another order."""
    x, weight, bias = make(N, 304, 43, torch.bfloat16, device)
    wide, tall = torch.full((2, 50, 400), torch.nan, device=device).bfloat16()
    wide[2:45, 16:320], tall[3 : 3 + N, :304] = weight, x
    out = decode_linear(tall[3 : 3 + N, :304], wide[2:45, 16:320], bias, backend="triton")
    assert torch.equal(out, decode_linear(x, weight, bias, backend="triton"))


@pytest.mark.parametrize("N", [1, 9])
def test_offsets_of_64_bits(N, kernels, device, monkeypatch):
    """Rows of a weight 2^29 numbers apart, in memory that is never touched between them."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x, weight, bias = make(N, 48, 5, torch.bfloat16, device)
    far = torch.empty(2**31 + 2**10, dtype=torch.bfloat16, device=device)
    far = far.as_strided(weight.shape, (2**29, 1)).copy_(weight)
    near = decode_linear(x, weight, bias, backend="triton")
    assert torch.equal(decode_linear(x, far, bias, backend="triton"), near)


@pytest.mark.parametrize(
    ("N", "K", "O", "dtype", "kernel", "programs"),
    [
        (1, 2560, 7680, torch.bfloat16, "_vector_kernel", 1920),  # an output a warp, four warps
        (2, 64, 7, torch.float16, "_vector_kernel", 2),
        (3, 64, 17, torch.float16, "_vector_kernel", 3),  # two outputs a warp
        (5, 64, 33, torch.bfloat16, "_tile_kernel", 2),
        (16, 64, 33, torch.float32, "_vector_kernel", 10),  # five parts of the outputs, eight rows at once
    ],
)
def test_one_launch(N, K, O, dtype, kernel, programs, kernels, device, monkeypatch):
    launches = []
    monkeypatch.setattr(
        kernels.Launch, "__call__", lambda launch, *_: launches.append((launch.kernel, launch.grid))
    )
    x, weight, bias = (torch.empty(shape, device=device, dtype=dtype) for shape in ((N, K), (O, K), (O,)))
    decode_linear(x, weight, bias, backend="triton")
    assert launches == [(getattr(kernels, kernel), (programs,))]


def test_tiles_fill_the_chip():
    """Of few programs each has more under way."""
    stages = {O: launch_config.tiles(16, O, 132).stages for O in (2560, 4224, 4225, 8448, 10240)}
    assert stages == {2560: 5, 4224: 5, 4225: 4, 8448: 4, 10240: 3}
    for K, pieces in ((2560, 10), (10240, 10), (2816, 6), (768, 3), (1, 1)):
        assert launch_config.vectors(1, K, 2).pieces == pieces


def test_what_a_gpu_is_given(kernels, device, monkeypatch):
    """Of sm_80 and later: this backend, and plain PyTorch beyond its limits, strides among them."""
    monkeypatch.setattr(_backends, "_candidates_for", lambda *_: ("triton", "reference"))
    monkeypatch.setattr(_backends, "_passed", {})
    launched = []
    launch = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *a: launched.append(1) or launch(*a))
    x, weight, bias = make(native.MOST_ROWS + 1, device=device)
    columns = weight.t().contiguous().t()
    for _ in range(2):  # the second time from memory
        for arguments, expected in (
            ((x[:-1], weight, bias), 1),
            ((x[:-1], columns, bias), 0),
            ((x, weight, bias), 0),
            ((x[:1].double(), weight.double()), 0),
            ((x[:1], weight.clone().requires_grad_()), 0),
        ):
            launched.clear()
            out = decode_linear(*arguments)
            assert len(launched) == expected
            torch.testing.assert_close(out, F.linear(*arguments), atol=1e-4, rtol=1e-4)
    with pytest.raises(NotImplementedError, match=r"weight of contiguous rows, got strides \(1, 40\); use"):
        decode_linear(x[:1], columns, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1, 4, 16])
def test_a_graph_follows_its_inputs(N):
    x, weight, bias = make(N, 2560, 2560, torch.bfloat16, "cuda")
    step = lambda: decode_linear(x, weight, bias, activation="gelu_tanh", backend="triton")  # noqa: E731
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, step())


# ---- compiled for chips that are not here


def assert_streams(report):
    """Weights come by loads of 16 bytes, all of a turn before any is used."""
    ptx = report.ptx
    assert not re.search(r"\bmma\.", ptx) or report.name == "_tile_kernel", report
    if report.name == "_tile_kernel":
        assert report.matrix_instructions == ["mma"], report
        copies = re.findall(r"cp\.async\.c[ag]\S* \[[^]]*\], \[[^]]*\], (\S+?),", ptx)
        assert copies and set(copies) == {"0x10"}, report
        return
    loads = re.findall(r"ld\.global\.L1::evict_first\S*\.v4\.b32", ptx)
    assert len(loads) == report.constants["PIECES"] * report.constants["OUTPUTS"], report
    turn, rest = ptx[: ptx.index("fma.rn")], ptx[ptx.index("fma.rn") :]
    assert "evict_first" not in rest and "bar.sync" in turn[turn.rindex("evict_first") :], report
    # They lie in registers together; two programs and more share a multiprocessor.
    assert 4 * len(loads) < report.registers <= 168, report
    # No tile changes its layout through shared memory, one number a warp apart.
    assert report.shared <= 4 * report.options["num_warps"], report


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_the_benchmarks(arch):
    reports = compile_calls(calls[0] for calls in benchmark_calls("decode_linear", arch))
    assert_clean(reports)
    assert {(r.name, r.constants["GELU"]) for r in reports} == {
        (name, gelu) for name in ("_vector_kernel", "_tile_kernel") for gelu in (False, True)
    }
    for report in reports:
        assert_streams(report)


def test_other_shapes_compile():
    shapes = [(N, 2560, 640) for N in (2, 3, 4, 8)] + [(1, 2561, 640), (12, 2561, 640)]
    calls = []
    for N, K, O in shapes:
        x, weight = meta(N, K), meta(O, K)
        calls += [Call("decode_linear", (x, weight), {}, arch) for arch in (80, 90)]
    reports = compile_calls(calls)
    assert len(reports) == 2 * len(shapes)
    assert_clean(reports)
    for report in reports:
        if report.constants["WHOLE"]:
            assert_streams(report)


def test_a_single_number_compiles():
    """Sizes and strides of 1 are constants to Triton."""
    calls = [Call("decode_linear", (meta(N, 1), meta(1, 1), meta(1)), {}, 90) for N in (1, 5)]
    assert_clean(compile_calls(calls))
