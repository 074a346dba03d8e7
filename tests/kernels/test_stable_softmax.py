# SPDX-License-Identifier: Apache-2.0
"""stable_softmax: the reference by hand and by properties, then every backend against it."""

from __future__ import annotations

import re

import pytest
import torch

from cogview_kernels import _extension, stable_softmax
from cogview_kernels._torch_ops import Op
from cogview_kernels.stable_softmax.op import stable_softmax_backward_op, stable_softmax_op
from cogview_kernels.stable_softmax.reference import stable_softmax_reference
from tests.helpers import cuda_compile
from tests.helpers.tolerance import GRADIENT, OUTPUT, assert_within_budget, judge
from tests.helpers.triton_compile import (
    DECIDING,
    Call,
    assert_clean,
    benchmark_calls,
    compile_calls,
    meta,
)

BACKENDS = ["cpu", "triton", "cuda"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# name: (shape, arguments, shape of the mask). A CPU vector has 4, 8 or 16 lanes; Triton keeps up to
# 32,768 columns in registers, 20,480 under a mask and backward, in pieces of up to 4,096.
CASES = {
    "one": ((1, 1), {}, None),
    "vector": ((3, 16), {}, None),
    "past_a_vector": ((2, 3, 5, 17), {"alpha": 32.0, "scale": 0.125}, None),
    "one_dimension": ((40,), {"scale": -0.5}, None),
    "causal": ((2, 40, 40), {"causal": True}, None),
    "causal_wide": ((1, 2, 5, 33), {"causal": True, "alpha": 4.0}, None),
    "causal_tall": ((37, 9), {"causal": True}, None),
    "row_mask": ((2, 3, 9, 37), {}, (2, 1, 1, 37)),
    "full_mask": ((3, 9, 37), {"alpha": 2.0}, (3, 9, 37)),
    "column_mask": ((3, 9, 37), {}, (9, 1)),
    "causal_mask": ((2, 2, 33, 33), {"causal": True}, (1, 1, 33, 33)),
    "five_dimensions": ((2, 2, 2, 3, 19), {}, (2, 1, 1, 19)),
    "long": ((3, 2 * 16384 + 5), {}, None),
    "long_aligned": ((2, 2 * 16384 + 16), {"scale": -0.5}, None),
    "long_masked": ((2, 20480 + 3), {"alpha": 3.0}, (1, 20480 + 3)),
    "long_causal": ((5, 20480 + 16), {"causal": True, "scale": -1.0}, None),
    "rows_of_one_program_in_two_batches": ((3, 3, 3, 48), {"causal": True}, (3, 1, 1, 48)),
}


def make_case(name: str, dtype: torch.dtype, device: torch.device):
    shape, arguments, mask_shape = CASES[name]
    scores = (4 * torch.randn(shape)).to(dtype).to(device)
    if mask_shape is not None:
        mask = torch.rand(mask_shape) < 0.6
        mask[..., :1] |= ~mask.any(-1, keepdim=True)
        arguments = {**arguments, "mask": mask.to(device)}
    dprobs = torch.randn(shape).to(dtype).to(device)
    return scores, arguments, dprobs


def with_gradient(function, scores, dprobs, **arguments):
    scores = scores.detach().requires_grad_()
    probs = function(scores, **arguments)
    (dscores,) = torch.autograd.grad(probs, scores, dprobs)
    return probs.detach(), dscores


# ---- the reference


def test_reference_by_hand():
    scores = torch.tensor([[0.0, 1.0, 3.0], [2.0, 5.0, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    probs = stable_softmax_reference(scores, alpha=2.0, scale=0.5, mask=mask)
    e = torch.e
    expected = torch.tensor([[1 / (1 + e**3), 0.0, e**3 / (1 + e**3)], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(probs, expected)


@pytest.mark.parametrize("case", ["past_a_vector", "causal_mask", "full_mask"])
def test_reference_gradient(case):
    scores, arguments, _ = make_case(case, torch.float64, torch.device("cpu"))
    scores = scores[..., :9, :9] if arguments.get("causal") else scores[..., :9]
    if "mask" in arguments:
        arguments["mask"] = (
            arguments["mask"][..., :9, :9] if arguments.get("causal") else arguments["mask"][..., :9]
        )
    call = lambda x: stable_softmax_reference(x, **arguments)  # noqa: E731  (gradcheck wants one argument)
    assert torch.autograd.gradcheck(call, scores.requires_grad_())


def test_equals_torch_softmax():
    scores = torch.randn(4, 50, dtype=torch.float64)
    ours = stable_softmax(scores, alpha=32.0, scale=1 / 32, backend="reference")
    torch.testing.assert_close(ours, torch.softmax(scores, -1))


# ---- every backend against the reference


def check(backend, scores, dprobs, arguments):
    ours = with_gradient(stable_softmax, scores, dprobs, **arguments, backend=backend)
    reference = lambda *x: with_gradient(stable_softmax_reference, *x, **arguments)  # noqa: E731
    truth, eager = judge(reference, [scores, dprobs])
    for name, factor, a, e, t in zip(
        ("probs", "dscores"), (OUTPUT, GRADIENT), ours, eager, truth, strict=True
    ):
        assert_within_budget(a, e, t, dtype=scores.dtype, factor=factor, name=name)


@pytest.mark.budget
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(backend, dtype, case, backend_device):
    scores, arguments, dprobs = make_case(case, dtype, backend_device(backend))
    check(backend, scores, dprobs, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_is_read_in_place(backend, backend_device):
    wide = torch.randn(3, 7, 2, 24, device=backend_device(backend))
    for scores in (wide[:, :, 1, 3:20], wide.transpose(0, 1)[..., 0, :], wide.transpose(-1, -2)):
        probs = stable_softmax(scores, backend=backend)
        torch.testing.assert_close(probs, torch.softmax(scores, -1))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty(backend, shape, backend_device):
    scores = torch.randn(shape, device=backend_device(backend), requires_grad=True)
    probs = stable_softmax(scores, backend=backend)
    probs.sum().backward()
    assert probs.shape == shape and scores.grad.shape == shape


@pytest.mark.parametrize("N", [40, 20480 + 40])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_fully_masked_row_gives_zeros(backend, N, backend_device):
    scores = torch.randn(4, N, device=backend_device(backend), requires_grad=True)
    mask = torch.ones(4, N, dtype=torch.bool, device=scores.device)
    mask[2] = False
    probs = stable_softmax(scores, mask=mask, backend=backend)
    probs.square().sum().backward()
    assert bool((probs[2] == 0).all()) and bool((scores.grad[2] == 0).all())
    torch.testing.assert_close(probs[:2].sum(-1), torch.ones(2, device=scores.device))
    minus_inf = torch.full((2, N), -torch.inf, device=scores.device)
    assert bool((stable_softmax(minus_inf, backend=backend) == 0).all())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nan_is_not_hidden(backend, backend_device):
    scores = torch.randn(3, 40, device=backend_device(backend))
    scores[1, 7] = torch.nan
    probs = stable_softmax(scores, backend=backend)
    assert bool(probs[1].isnan().all()) and not bool(probs[[0, 2]].isnan().any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores(backend, backend_device):
    """fp16 at its limit, differences far past exp's range, constant rows, one huge outlier."""
    device = backend_device(backend)
    limit = torch.finfo(torch.float16).max
    rows = torch.zeros(4, 50, dtype=torch.float16)
    rows[0, ::2], rows[0, 1::2] = limit, -limit
    rows[1] = limit
    rows[2, 11] = limit
    rows[3] = -limit
    probs = stable_softmax(rows.to(device), alpha=32.0, backend=backend).cpu().float()
    expected = torch.zeros(4, 50)
    expected[0, ::2], expected[1], expected[2, 11], expected[3] = 1 / 25, 1 / 50, 1.0, 1 / 50
    torch.testing.assert_close(probs, expected, atol=0, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_sum_to_one_and_shifts_change_nothing(backend, backend_device):
    scores = 5 * torch.randn(64, 1000, device=backend_device(backend))
    probs = stable_softmax(scores, alpha=3.0, scale=0.5, backend=backend)
    torch.testing.assert_close(probs.sum(-1), torch.ones(64, device=scores.device))
    shifted = stable_softmax(scores + 64, alpha=3.0, scale=0.5, backend=backend)
    torch.testing.assert_close(shifted, probs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, backend_device):
    scores, arguments, dprobs = make_case("causal_mask", torch.float32, backend_device(backend))
    first = with_gradient(stable_softmax, scores, dprobs, **arguments, backend=backend)
    second = with_gradient(stable_softmax, scores, dprobs, **arguments, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.budget
@pytest.mark.parametrize("N", [58_240, 100_000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_rows(backend, N, backend_device):
    """The vocabulary, and past every on-chip size; the last elements matter."""
    scores = torch.randn(2, N, device=backend_device(backend))
    scores[:, -3:] += 12
    dprobs = torch.randn_like(scores)
    check(backend, scores, dprobs, {})


@pytest.mark.parametrize("backend", BACKENDS)
def test_subnormal_scores_and_a_huge_outlier(backend, backend_device):
    tiny = torch.finfo(torch.float16).smallest_normal
    scores = torch.stack([torch.randn(40) * tiny / 4, torch.randn(40)]).half()
    scores[1, 7] = torch.finfo(torch.float16).max
    probs = stable_softmax(scores.to(backend_device(backend)), backend=backend).cpu().float()
    expected = torch.zeros(2, 40)
    expected[0], expected[1, 7] = 1 / 40, 1
    torch.testing.assert_close(probs, expected, atol=0, rtol=1e-3)


# ---- dispatch


@pytest.mark.budget
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, instruction_set):
    instruction_set(isa)
    for dtype in DTYPES:
        scores, arguments, dprobs = make_case("causal_mask", dtype, torch.device("cpu"))
        check("cpu", scores, dprobs, arguments)


@pytest.mark.parametrize(
    ("N", "forward_rest", "backward_rest"),
    [
        (20_480, False, False),
        (20_481, True, True),
        (20_496, False, True),
        (32_768, False, True),
        (32_784, True, True),
    ],
)
def test_triton_branch_by_row_length(N, forward_rest, backward_rest, monkeypatch, backend_device):
    device = backend_device("triton")
    from cogview_kernels.stable_softmax import triton_kernels

    seen = []
    tiling = triton_kernels.tiling
    monkeypatch.setattr(triton_kernels, "tiling", lambda *a: seen.append(tiling(*a)) or seen[-1])
    scores = torch.randn(1, N, device=device, requires_grad=True)
    stable_softmax(scores, backend="triton").sum().backward()
    assert [t["REST"] for t in seen] == [forward_rest, backward_rest]


# ---- PyTorch integration


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, backend_device):
    device = backend_device(backend)
    scores = torch.randn(2, 5, 8, device=device, requires_grad=True)
    mask = torch.rand(5, 8, device=device) < 0.7
    torch.library.opcheck(torch.ops.cogview_kernels.stable_softmax, (scores, 2.0, 0.5, mask, True, backend))
    grad, probs = torch.randn(2, 5, 8, device=device), torch.rand(2, 5, 8, device=device)
    torch.library.opcheck(torch.ops.cogview_kernels.stable_softmax_backward, (grad, probs, 1.0, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_graph_break(backend, backend_device):
    scores = torch.randn(4, 30, device=backend_device(backend))
    function = lambda x: stable_softmax(2 * x, causal=True, backend=backend) + 1  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        leaf = scores.detach().requires_grad_()
        out = call(leaf)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
    torch.testing.assert_close(results[0], results[1])


def test_op_called_by_name_is_differentiable(backend_device):
    scores = torch.randn(3, 8, requires_grad=True, device=backend_device("cpu"))
    torch.ops.cogview_kernels.stable_softmax(scores, 1.0, 1.0, None, False, "cpu").square().sum().backward()
    expected = torch.autograd.grad(torch.softmax(scores, -1).square().sum(), scores)[0]
    torch.testing.assert_close(scores.grad, expected)


def test_selective_checkpointing_sees_the_op(backend_device):
    backend_device("cpu")
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(str(op))
        return CheckpointPolicy.MUST_SAVE

    scores = torch.randn(3, 8, requires_grad=True)
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    checkpoint(stable_softmax, scores, use_reentrant=False, context_fn=contexts).sum().backward()
    assert "cogview_kernels.stable_softmax.default" in seen


def test_eager_call_skips_the_autograd_key(monkeypatch):
    calls = []
    monkeypatch.setattr(Op, "_dispatch", lambda op, *_: calls.append("the dispatcher"))
    for op in (stable_softmax_op, stable_softmax_backward_op):
        monkeypatch.setattr(op, "kernel", lambda *a, op=op, run=op.kernel: calls.append(op.name) or run(*a))
    stable_softmax(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert calls == ["stable_softmax", "stable_softmax_backward"] or _extension.native is None


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scores": torch.ones(3, dtype=torch.int64)}, TypeError, "scores must be float32"),
        (
            {"scores": torch.ones(3, dtype=torch.float64), "backend": "cpu"},
            NotImplementedError,
            "the cpu backend takes scores in float32, float16 or bfloat16, got torch.float64",
        ),
        ({"scores": torch.ones(())}, ValueError, "at least one dimension"),
        ({"scores": torch.ones(3), "causal": True}, ValueError, r"\[..., T, N\], got shape \(3,\)"),
        ({"alpha": 0.0}, ValueError, "alpha must be a positive finite number, got 0.0"),
        ({"alpha": "2"}, TypeError, "alpha must be a number, got str"),
        ({"scale": float("inf")}, ValueError, "scale must be a finite number, got inf"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be boolean"),
        ({"mask": [True]}, TypeError, "mask must be a tensor or None, got list"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"shape of scores, \(2, 3\), got \(4,\)"),
        ({"mask": torch.ones(5, 2, 3, dtype=torch.bool)}, ValueError, "must broadcast"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
        ({"backend": "sdpa"}, NotImplementedError, "no sdpa backend; this op has"),
    ],
    ids=lambda value: None,
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        stable_softmax(**{"scores": torch.ones(2, 3), **arguments})


def test_a_backend_asked_for_never_falls_back():
    if torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="serves CPU tensors"):
            stable_softmax(torch.ones(2, 3, device="cuda"), backend="cpu")
    else:
        with pytest.raises(RuntimeError, match="serves NVIDIA GPUs, these tensors are on cpu"):
            stable_softmax(torch.ones(2, 3), backend="cuda")


@pytest.mark.parametrize("way", ["fwd", "bwd"])
def test_cuda_refuses_more_rows_than_a_grid_has(way, emulation):
    """Before anything is read: their number would have been cut to 32 bits, and rows left out."""
    rows, ones, native = 2**32 + 1, (1, 1, 1, 1), emulation.emulated_cuda()
    with pytest.raises(RuntimeError, match=rf"stable_softmax_{way}_kernel: more than 2\^31 blocks; split"):
        if way == "fwd":
            native.stable_softmax_fwd_cuda(0, 0, 0, (1, 1, rows, 1), ones, ones, 1.0, 1.0, False, 0, 0)
        else:
            native.stable_softmax_bwd_cuda(0, 0, 0, rows, 1, 1.0, 0, 0)


# ---- compiled for chips that are not here


@pytest.fixture(scope="module")
def benchmarked():
    """The kernels of the benchmark's shapes."""
    return compile_calls(call for arch in (80, 90) for call in benchmark_calls("stable_softmax", arch))


def test_triton_compiles_the_benchmarks_for_sm80_and_sm90(benchmarked):
    assert_clean(benchmarked)


def test_triton_moves_sixteen_bytes_at_once_in_benchmarks(benchmarked):
    """A thread's every load and store has 16 bytes. A mask that can end anywhere, such as the diagonal, makes
    eight of a load."""
    for report in benchmarked:
        moves = re.findall(r"(?:ld|st)\.global\S*|cp\.async\.c\S+ .*", report.ptx)
        assert moves
        for move in moves:
            assert ".v4.b32" in move or ", 0x10, " in move, (report, move)


@pytest.mark.parametrize("arch", [80, 90])
def test_triton_compiles_masks_and_odd_widths(arch):
    def calls():
        for shape, causal, mask in (
            ((4, 8, 1024, 1024), True, (1024, 1024)),
            ((6, 17), False, None),
            ((64, 20479), False, (64, 20479)),
            ((64, 100_000), True, (64, 100_000)),
            ((64, 100_001), False, None),
        ):
            options = {"causal": causal, "mask": mask and meta(*mask, dtype=torch.bool)}
            for dtype in DECIDING[arch]:
                yield Call("stable_softmax", (meta(*shape, dtype=dtype, grad=True),), options, arch)

    assert_clean(compile_calls(calls()))


@pytest.mark.skipif(bool(cuda_compile.why_not()), reason=cuda_compile.why_not())
@pytest.mark.parametrize("arch", [70, 90])
def test_cuda_compiles_without_spills(arch):
    ways = ("fwd", "bwd")
    kernels = [
        f"cogview::stable_softmax_{w}_kernel<{t}>" for w in ways for t in ("float", "__half", "__nv_bfloat16")
    ]
    source = '#include "stable_softmax/stable_softmax_kernels.cuh"'
    for kernel, report in cuda_compile.compile_kernels(source, kernels, arch).items():
        assert report.spills == 0, (kernel, report)
