# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels of both attentions.

Without a GPU: their arithmetic and indexing in the emulation of tests/emulation, and what NVRTC 12.9 makes of
them for sm_70. With one (``make gpu-check``) the same cases run on it; built with COGVIEW_CUDA_ARCHS=75 they
run there from the PTX of compute capability 7.5.
"""

from __future__ import annotations

import pytest
import torch

from cogview_kernels import ThreeRegionLayout, _backends, _counters, decode_attention, three_region_attention
from cogview_kernels.three_region_attention import native
from tests.conftest import HAS_GPU
from tests.emulation import guarded
from tests.helpers import cuda_compile
from tests.kernels import test_decode_attention as decode
from tests.kernels import test_three_region_attention as attention

CUDA_HEADS = native.CUDA_HEADS
CASES = {
    name: case
    for name, case in {**attention.SMALL, **attention.LARGE}.items()
    if case.get("D", 32) in CUDA_HEADS
}
needs_emulation = pytest.mark.skipif(HAS_GPU, reason="checks of the emulation; the GPU runs the kernels")


# ---- three_region_attention


@pytest.mark.budget
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case, backend_device):
    """Alternately with dropout, so that each head size meets both."""
    dropout_p = 0.3 * (list(CASES).index(case) % 2)
    device = backend_device("cuda")
    attention.check_against_reference(
        "cuda", CASES[case], torch.float16, device, dropout_p=dropout_p, lse=True
    )


@pytest.mark.budget
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("D", CUDA_HEADS)
def test_head_sizes(D, dropout_p, backend_device):
    case = {"B": 2, "H": 2, "Hkv": 1, "T": 133, "w": 16, "W": 2, "P": 70, "D": D}
    attention.check_against_reference(
        "cuda", case, torch.float16, backend_device("cuda"), dropout_p=dropout_p, lse=True
    )


@pytest.mark.budget
def test_more_samples_than_a_grid_has_along_y(backend_device):
    """The emulation has 8 of CUDA's 65,535 (``kMostAlongYAndZ``)."""
    case = {"B": 9, "H": 1, "T": 40, "w": 4, "W": 2, "P": 12, "D": 32}
    attention.check_against_reference("cuda", case, torch.float16, backend_device("cuda"))


def _small(device, requires_grad=False):
    q, k, v, layout = attention.make(
        B=2, H=2, T=150, w=16, W=2, P=50, D=64, dtype=torch.float16, device=device
    )
    return *(x.requires_grad_(requires_grad) for x in (q, k, v)), layout


def _all_results(q, k, v, layout):
    out, lse = three_region_attention(q, k, v, layout, dropout_p=0.1, seed=5, return_lse=True, backend="cuda")
    torch.manual_seed(3)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse)))
    return [out.detach(), lse.detach(), *gradients]


def test_two_runs_give_the_same_bits(backend_device):
    inputs = _small(backend_device("cuda"), requires_grad=True)
    for a, b in zip(_all_results(*inputs), _all_results(*inputs), strict=True):
        assert torch.equal(a, b)


@needs_emulation
@pytest.mark.parametrize("D", [64, 128])
def test_neither_order_of_threads_nor_fragment_layout_matters(D, emulation):
    q, k, v, layout = attention.make(T=150, w=16, W=2, P=50, D=D, dtype=torch.float16)
    inputs = *(x.requires_grad_() for x in (q, k, v)), layout
    emulation.configure()
    expected = _all_results(*inputs)
    for settings in ({"order": 7}, {"fragment_layout": 1}, {"order": 11, "fragment_layout": 1}):
        emulation.configure(**settings)
        for a, b in zip(_all_results(*inputs), expected, strict=True):
            assert torch.equal(a, b), settings


@needs_emulation
def test_a_fragment_layout_without_pairs_stops_the_kernel(emulation):
    """Wrong numbers would be worse."""
    q, k, v, layout = _small("cpu")
    emulation.configure(fragment_layout=2)
    with pytest.raises(RuntimeError, match="trap"):
        three_region_attention(q, k, v, layout, backend="cuda")


@needs_emulation
@pytest.mark.parametrize("T", [1, 65, 130])
def test_nothing_outside_the_tensors_is_touched(T, emulation, monkeypatch):
    """Inputs, outputs and workspaces end at pages that fault."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    fence = lambda x: guarded(x) if x.numel() else x  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: fence(new_empty(*a, **o)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **o: fence(empty_like(*a, **o)))
    q, k, v, layout = attention.make(T=T, w=16, W=2, P=min(T, 40), D=64, dtype=torch.float16)
    q, k, v = (guarded(x).requires_grad_() for x in (q, k, v))
    layout = ThreeRegionLayout(guarded(layout.pivots), 16, 2, 0.5)
    assert all(bool(torch.isfinite(x).all()) for x in _all_results(q, k, v, layout))


@needs_emulation
def test_errors_of_cuda_name_the_kernel(emulation):
    """As on a chip that gives a block too little shared memory."""
    q, k, v, layout = attention.make(T=20, D=128, P=3, dtype=torch.float16)
    k.requires_grad_()
    out = three_region_attention(q, k, v, layout, backend="cuda")
    emulation.configure(shared_limit=48 * 1024)
    with pytest.raises(RuntimeError, match=r"three_region_attention_bwd_dkv_kernel.*cudaErrorInvalidValue"):
        out.sum().backward()


def test_scores_far_past_the_fp16_limit(backend_device):
    q, k, v, layout = _small(backend_device("cuda"))
    q, k = (x * (60000 / x.abs().max()) for x in (q, k))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = three_region_attention(*leaves, layout, backend="cuda")
    expected = three_region_attention(q.double(), k.double(), v.double(), layout, backend="reference")
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)
    dout = torch.randn_like(out)
    *others, dv = torch.autograd.grad(out, leaves, dout)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in others)
    # One key takes it all: its probability must come back as 1 from the backward too.
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = three_region_attention(*wide, layout, backend="reference")
    (expected_dv,) = torch.autograd.grad(expected, wide[2:], dout.double())
    torch.testing.assert_close(dv.double(), expected_dv, atol=2e-2, rtol=2e-2)


def test_rows_that_are_not_aligned_are_copied(backend_device):
    q, k, v, layout = _small(backend_device("cuda"))
    wide = torch.zeros(*q.shape[:3], 67, dtype=q.dtype, device=q.device)
    skewed = wide[..., 1:65].copy_(q)
    torch.testing.assert_close(
        three_region_attention(skewed, k, v, layout, backend="cuda"),
        three_region_attention(q, k, v, layout, backend="cuda"),
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("dtype", "D", "message"),
    [
        (torch.bfloat16, 64, r"cuda backend computes in float16, got torch.bfloat16; .*backend='sdpa'"),
        (torch.float16, 40, r"cuda backend takes head sizes 32, 64, 80, 96, 128, got 40; use backend='sdpa'"),
    ],
)
def test_limits(dtype, D, message, backend_device, monkeypatch):
    device = backend_device("cuda")
    q, k, v, layout = attention.make(T=20, P=3, D=D, dtype=dtype, device=device)
    with pytest.raises(NotImplementedError, match=message):
        three_region_attention(q, k, v, layout, backend="cuda")
    # Not asked for by name, it gives way.
    expected = three_region_attention(q, k, v, layout, backend="sdpa")
    monkeypatch.setattr(_backends, "_candidates_for", lambda *_: ("cuda", "sdpa", "reference"))
    monkeypatch.setattr(_backends, "_passed", {})
    torch.testing.assert_close(three_region_attention(q, k, v, layout), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_opcheck(dropout_p, backend_device):
    q, k, v, layout = _small(backend_device("cuda"), requires_grad=True)
    arguments = (q, k, v, *attention.regions(layout), 0.125, dropout_p, torch.tensor(3), "cuda")
    torch.library.opcheck(torch.ops.cogview_kernels.three_region_attention.default, arguments)


# ---- decode_attention


@pytest.mark.budget
@pytest.mark.parametrize("with_layout", [False, True])
@pytest.mark.parametrize("dtype", decode.DTYPES, ids=str)
@pytest.mark.parametrize("case", decode.CASES)
def test_decode(case, dtype, with_layout, backend_device):
    decode.test_error_budget("cuda", case, dtype, with_layout, backend_device)


@pytest.mark.budget
@pytest.mark.parametrize(("D", "Hkv", "Tq"), [(32, 4, 1), (64, 4, 1), (80, 2, 3), (128, 1, 2), (256, 4, 1)])
def test_decode_over_several_blocks(D, Hkv, Tq, backend_device):
    """Past one block's keys, with rubbish past each sequence's end, against the last rows of training.

    Of a call the last blocks merge, and leave their counters at zero for the next."""
    device = backend_device("cuda")
    B, H, S, T = 2, 4, 700, 660
    q, k, v = (torch.randn(B, h, T, D).half().to(device) for h in (H, Hkv, Hkv))
    pivots = torch.stack([torch.randperm(T)[:300] for _ in range(B)]).to(device)
    layout = ThreeRegionLayout(pivots, 64, 3, 0.5)
    k_cache, v_cache = (torch.full((B, Hkv, S, D), torch.nan).half().to(device) for _ in range(2))
    k_cache[:, :, :T], v_cache[:, :, :T] = k, v
    lengths = torch.tensor([T, T], device=device)
    for chosen in (layout, None):
        out, again = (
            decode_attention(
                q[:, :, T - Tq :], k_cache, v_cache, lengths, layout=chosen, scale=0.1, backend="cuda"
            )
            for _ in range(2)
        )
        assert torch.equal(again, out)
        assert _counters._kept and not any(bool(counters.any()) for counters in _counters._kept)
        everything = ThreeRegionLayout(pivots[:, :0], T, 1)
        expected = three_region_attention(
            q.float(), k.float(), v.float(), chosen or everything, scale=0.1, backend="reference"
        )
        torch.testing.assert_close(out.float(), expected[:, :, T - Tq :], atol=2e-3, rtol=2e-3)


@pytest.mark.budget
@pytest.mark.parametrize("with_layout", [False, True])
def test_decode_properties(with_layout, backend_device):
    decode.test_a_query_before_the_start_gives_zeros("cuda", 90, with_layout, backend_device)
    decode.test_compile_without_graph_break("cuda", with_layout, backend_device)
    decode.test_keys_outside_the_layout_are_not_seen("cuda", backend_device)


# ---- compilation for chips that are not here


SOURCES = {
    "three_region_attention": ("sort", "forward", "backward"),
    "decode_attention": ("decode",),
}


def _attention_kernels() -> list[str]:
    kernels = ["three_region_attention_sort_kernel"]
    for D in CUDA_HEADS:
        kernels.append(f"three_region_attention_bwd_delta_kernel<{D}>")
        # Of layouts to both sides the plain kernels alone: compiling takes long.
        for dropout, causal in (("false", "true"), ("true", "true"), ("false", "false")):
            kernels.append(f"three_region_attention_fwd_kernel<{D}, {dropout}, {causal}>")
            kernels.append(f"three_region_attention_bwd_dq_kernel<{D}, {dropout}, {causal}>")
            kernels += [
                f"three_region_attention_bwd_dkv_kernel<{D}, {dropout}, {far}, {causal}>"
                for far in ("false", "true")
            ]
    return kernels


def _decode_kernels() -> list[str]:
    types = ("float", "__half", "__nv_bfloat16")
    return [
        f"decode_attention_kernel<{t}, {lanes}, {rows}>"
        for t in types
        for lanes in (4, 8, 16, 32)
        for rows in (1, 4)
    ]


def _source(op: str) -> str:
    return "".join(f'#include "{op}/{name}.cuh"\n' for name in SOURCES[op])


@pytest.mark.skipif(bool(cuda_compile.why_not()), reason=cuda_compile.why_not())
@pytest.mark.parametrize("arch", [75, 80, 90, 120])
def test_compiles_for_newer_chips(arch):
    """No spills there either. A release compiles all head sizes for 75, 80 and 90."""
    sizes = ("<64, false", "<128, false")
    kernels = [f"cogview::{kernel}" for kernel in _attention_kernels() if any(s in kernel for s in sizes)]
    kernels = [kernel for kernel in kernels if kernel.endswith("true>")]  # the causal ones
    reports = cuda_compile.compile_kernels(_source("three_region_attention"), kernels, arch)
    assert len(reports) == 8
    for kernel, report in reports.items():
        assert report.spills == 0 and report.registers <= 255, f"{kernel} sm_{arch}: {report}"


@pytest.mark.skipif(bool(cuda_compile.why_not()), reason=cuda_compile.why_not())
@pytest.mark.parametrize("op", SOURCES)
def test_compiles_for_sm_70(op):
    """No spills, and shared memory that sm_70 has; for the attention also what sm_75 has."""
    kernels = _attention_kernels() if op == "three_region_attention" else _decode_kernels()
    source = _source(op)
    if op == "three_region_attention":
        for D in CUDA_HEADS:
            for shape in ("ForwardShape", "QueryGradientShape", "KeyGradientShape"):
                limit = cuda_compile.SHARED_MEMORY_LIMIT[75]
                source += f"static_assert(cogview::{shape}<{D}>::kShared <= {limit});\n"
                if shape != "ForwardShape":
                    source += f"static_assert(cogview::{shape}<{D}, false>::kShared <= {limit});\n"
    reports = cuda_compile.compile_kernels(source, [f"cogview::{kernel}" for kernel in kernels], 70)
    for kernel, report in reports.items():
        assert report.spills == 0, f"{kernel}: {report}"
        assert report.registers <= 255 and report.shared <= 48 * 1024, f"{kernel}: {report}"
    if op == "three_region_attention":
        # As the kernel's comment says of occupancy: 65,536 registers, blocks of 128 (256) threads.
        for D, forward_blocks in ((32, 3), (64, 2), (128, 1)):
            threads = 128 if D <= 64 else 256
            both_sides = ("false", "false", min(2, forward_blocks))
            for dropout, causal, blocks in (("true", "true", forward_blocks), both_sides):
                name = f"cogview::three_region_attention_fwd_kernel<{D}, {dropout}, {causal}>"
                assert 65536 // (threads * reports[name].registers) >= blocks
