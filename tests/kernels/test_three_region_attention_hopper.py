# SPDX-License-Identifier: Apache-2.0
"""The compiled forward of three_region_attention for Hopper.

On a GPU of compute capability 9.0 the kernel runs. Without a GPU the emulation of tests/emulation runs it,
with index and backward in Triton's interpreter, and NVRTC compiles it.
"""

from __future__ import annotations

import pytest
import torch

from cogview_kernels import ThreeRegionLayout, _device, _extension, three_region_attention
from cogview_kernels._dropout import Dropout
from tests.conftest import HAS_GPU
from tests.helpers import cuda_compile
from tests.kernels import test_three_region_attention as attention

HALVES = [torch.bfloat16, torch.float16]
CASES = {
    "ring_goes_round": {"T": 250, "w": 16, "W": 1, "P": 240, "H": 1},
    "grouped_heads": {"B": 2, "Hkv": 1, "T": 130, "w": 16, "W": 3, "P": 77},
    "odd_blocks": {"T": 222, "w": 50, "W": 2, "P": 111, "bias": -2.5},
    "pads": {"B": 2, "pivots": [[-1, 17, 0, 5, -1], [8, 22, -1, 2, 11]]},
    "no_pivots": {"T": 190, "w": 64, "W": 2},
    "one_position": {"T": 1, "P": 1},
}
LARGE = {
    "many_pivots": {"T": 1000, "w": 128, "W": 1, "P": 700},
    "small_blocks": {"T": 1300, "w": 16, "W": 6, "P": 1000, "bias": 5.0},
    "blocks_of_seven": {"T": 300, "w": 7, "W": 2, "P": 250},
    "paper": {"B": 2, "H": 4, "T": 4224, "w": 128, "W": 6, "P": 768},
}
# Products of whole numbers are exact in any order of addition.
INPUTS = {"plain": lambda x: x, "past_float16": lambda x: (2 * x).round() * 1024}
large_on_a_gpu = [
    pytest.param(c, marks=[] if HAS_GPU else pytest.mark.skip(reason="needs a GPU")) for c in LARGE
]


@pytest.fixture(autouse=True)
def _large_tiles_in_the_interpreter(monkeypatch):
    """A tile of any size takes it about as long; a GPU runs the shipped sizes."""
    from cogview_kernels.three_region_attention import launch_config

    if not HAS_GPU:
        monkeypatch.setattr(launch_config, "choose", lambda *_: launch_config.Config(128, 128, 4, 1))


@pytest.fixture
def hopper(backend_device, monkeypatch):
    """The device on which ``backend="triton"`` launches the kernel, and how often it did."""
    device = backend_device("triton")
    from cogview_kernels.three_region_attention import forward_hopper

    if HAS_GPU:
        if _device.capability(device) != (9, 0):
            pytest.skip("needs compute capability 9.0")
        if not hasattr(_extension.native, forward_hopper._FUNCTION):
            pytest.skip("the extension was built without compute capability 9.0")
    else:
        backend_device("cuda")  # the emulation
        monkeypatch.setattr(forward_hopper, "takes", lambda tensors, *_: forward_hopper.is_aligned(*tensors))
    launches = []
    launch = forward_hopper.launch
    monkeypatch.setattr(forward_hopper, "launch", lambda *a: launches.append(a) or launch(*a))
    from cogview_kernels.three_region_attention import triton_kernels

    triton_kernels._forward_plans.kept.clear()
    yield device, launches
    triton_kernels._forward_plans.kept.clear()


@pytest.mark.budget
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *large_on_a_gpu])
def test_forward_and_backward_on_a_gpu(case, dtype, hopper):
    """The backward is Triton's, on what the kernel leaves for it."""
    device, launches = hopper
    attention.check_against_reference(
        "triton", {"D": 64, **{**CASES, **LARGE}[case]}, dtype, device, lse=True
    )
    assert len(launches) == 1


def _forward(q, k, v, layout, scale):
    """Out, lse, and both peaks of each row."""
    from cogview_kernels.three_region_attention import triton_kernels

    numbers = q, layout.pivots, layout.block_size, layout.window_blocks
    residuals = q.new_full((triton_kernels.residuals_size(*numbers),), -1, dtype=torch.int32)
    out, lse = torch.full_like(q, torch.nan), q.new_full(q.shape[:3], torch.nan, dtype=torch.float32)
    triton_kernels.forward(q, k, v, layout, None, scale, None, (out, lse, residuals), "triton")
    B, H, T, _ = q.shape
    peaks = residuals[residuals.numel() - 2 * B * H * T :].view(torch.float32).view(B, H, 2, T)
    return out, lse, peaks


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("kind", "scale"), [("plain", 0.125), ("plain", 0.0), ("past_float16", -0.3)])
def test_what_it_leaves_is_what_triton_leaves_on_a_gpu(kind, scale, dtype, hopper, monkeypatch):
    """Twice the same bits, also of rows that lie apart."""
    from cogview_kernels.three_region_attention import forward_hopper, triton_kernels

    device, launches = hopper
    q, k, v, layout = attention.make(B=2, T=140, w=16, W=2, P=100, D=64, dtype=dtype, device=device)
    q, k = map(INPUTS[kind], (q, k))
    ours = _forward(q, k, v, layout, scale)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for a, b in zip(_forward(*apart, layout, scale), ours, strict=True):
        assert torch.equal(a, b)
    assert len(launches) == 2
    monkeypatch.setattr(forward_hopper, "takes", lambda *_: False)
    triton_kernels._forward_plans.kept.clear()
    expected = _forward(q, k, v, layout, scale)
    torch.testing.assert_close(ours[0], expected[0], atol=0.02, rtol=0.02)
    torch.testing.assert_close(ours[1], expected[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[2].sum(2), expected[2].sum(2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[2][:, :, 0], expected[2][:, :, 0], atol=1e-5, rtol=1e-5)
    if kind == "past_float16":  # what the maximum was rounded by is many times the sum's logarithm
        torch.testing.assert_close(ours[2][:, :, 1], expected[2][:, :, 1], atol=1e-4, rtol=1e-5)


def test_rows_between_multiples_of_16_bytes_are_left_to_triton_on_a_gpu(hopper):
    device, launches = hopper
    *tensors, layout = attention.make(T=70, w=16, W=2, P=30, D=72, dtype=torch.float16, device=device)
    q, k, v = (x[..., 8:] for x in tensors)
    moved = k.new_empty(*k.shape[:3], 72)[..., 4:68].copy_(k)  # alike but for the address
    expected = _forward(q, k, v, layout, 0.125)
    assert len(launches) == 1
    out, lse, _ = _forward(q, moved, v, layout, 0.125)
    assert len(launches) == 1
    torch.testing.assert_close(out, expected[0], atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(HAS_GPU, reason="checks of the emulation; the GPU runs the kernel")
def test_the_order_of_threads_does_not_matter(hopper, emulation):
    q, k, v, layout = attention.make(B=1, T=250, w=16, W=2, P=200, D=64, dtype=torch.bfloat16)

    def call():
        return three_region_attention(q, k, v, layout, backend="triton")

    expected = call()
    for order in (7, 11):
        emulation.configure(order=order)
        assert torch.equal(call(), expected)


def test_what_it_takes(monkeypatch):
    pytest.importorskip("triton")
    from cogview_kernels.three_region_attention import forward_hopper

    q, k, v, layout = attention.make(T=20, P=5, D=64, dtype=torch.bfloat16)
    tensors, native = (q, k, v, q.clone()), type("C", (), {forward_hopper._FUNCTION: None})
    both_sides = ThreeRegionLayout(layout.pivots, 4, 2, causal=False)
    starts, dropout = torch.zeros(1, dtype=torch.int64), Dropout.of(0.1, torch.tensor(1))

    def pretend(capability):
        return _device.Properties("a GPU", capability, 132)

    assert not forward_hopper.takes(tensors, layout, None, None)  # on the CPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(_extension, "native", native)
    monkeypatch.setattr(_device, "properties", lambda _: pretend((9, 0)))
    assert forward_hopper.takes(tensors, layout, None, None)

    def with_k(k):
        return (q, k, v, q)

    wide = torch.zeros(1, 2, 20, 68, dtype=torch.bfloat16)
    assert forward_hopper.takes(with_k(wide.new_zeros(1, 2, 20, 72)[..., 8:]), layout, None, None)
    for name, refused in {
        "float32": tuple(x.float() for x in tensors),
        "D of 32": tuple(x[..., :32] for x in tensors),
        "rows of 68": with_k(wide[..., :64]),
        "a first element between": with_k(wide.new_zeros(1, 2, 20, 72)[..., 4:68]),
        "rows 4 GiB apart": with_k(torch.empty_strided(k.shape, (0, 0, 2**31, 1), device="meta")),
    }.items():
        assert not forward_hopper.takes(refused, layout, None, None), name
    assert not forward_hopper.takes(tensors, both_sides, None, None)
    assert not forward_hopper.takes(tensors, layout, starts, None)
    assert not forward_hopper.takes(tensors, layout, None, dropout)
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(_device, "properties", lambda _, c=capability: pretend(c))
        assert not forward_hopper.takes(tensors, layout, None, None)
    monkeypatch.setattr(_device, "properties", lambda _: pretend((9, 0)))
    for missing in (None, object()):  # no extension, and one without the kernel
        monkeypatch.setattr(_extension, "native", missing)
        assert not forward_hopper.takes(tensors, layout, None, None)


@pytest.mark.skipif(bool(cuda_compile.why_not()), reason=cuda_compile.why_not())
def test_compiles_for_sm_90a():
    """No spills nor waits that nobody wrote, and shared memory and registers for two blocks."""
    types = ("__half", "__nv_bfloat16")
    kernels = [f"cogview::three_region_attention_fwd_sm90_kernel<{t}>" for t in types]
    limit = (cuda_compile.SHARED_MEMORY_LIMIT[90] + 1024) // 2 - 1024  # a block needs 1 KB besides
    source = '#include "three_region_attention/forward_sm90.cuh"\n'
    source += f"static_assert(cogview::Sm90Shape::kShared <= {limit});\n"
    for kernel, report in cuda_compile.compile_kernels(source, kernels, "90a").items():
        assert report.spills == 0 and not report.waits, f"{kernel}: {report}"
        assert report.registers <= 80, f"{kernel}: {report}"
