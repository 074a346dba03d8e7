# SPDX-License-Identifier: Apache-2.0
"""merge_attention: the reference, what CogView2 does with it, and every backend against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cogview_kernels import local_attention_2d, merge_attention
from cogview_kernels.merge_attention.op import merge_attention_op
from cogview_kernels.merge_attention.reference import merge_attention_reference
from tests.helpers.local_attention import joint_attention, text_slots, window_slots
from tests.helpers.tolerance import GRADIENT, OUTPUT, assert_within_budget, judge
from tests.helpers.triton_compile import Call, assert_clean, compile_calls, meta

KERNELS = ["cpu", "triton"]
ALL = ["reference", *KERNELS]


def make(count=2, B=2, H=3, T=37, D=32, dtype=torch.float32, device="cpu"):
    outputs = [torch.randn(B, H, T, D).to(dtype).to(device) for _ in range(count)]
    lses = [(2 * torch.randn(B, H, T)).to(device) for _ in range(count)]
    return outputs, lses


# ---- the reference


def test_reference_is_the_softmax_over_all_keys():
    q, k, v = (torch.randn(2, 3, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    outputs, lses = [], []
    for part in (slice(0, 7), slice(7, 8), slice(8, 40)):
        logits = q @ k[:, :, part].transpose(2, 3) * 8**-0.5
        outputs.append(logits.softmax(-1) @ v[:, :, part])
        lses.append(logits.logsumexp(-1))
    out, lse = merge_attention(outputs, lses, return_lse=True, backend="reference")
    expected = scaled_dot_product_attention(q, k, v)
    expected_lse = (q @ k.transpose(2, 3) * 8**-0.5).logsumexp(-1)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    ours, theirs = (
        torch.autograd.grad(results, (q, k, v), (dout, dlse), retain_graph=True)
        for results in ((out, lse), (expected, expected_lse))
    )
    torch.testing.assert_close(ours, theirs)


# ---- the calls of CogView2 and of SwissArmyTransformer


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def both(inputs, ours, theirs):
    """Output and gradients of ``inputs``."""
    results = []
    for call in (ours, theirs):
        out = call()
        results.append(
            (
                out,
                *torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)),
            )
        )
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("merged_by", ["reference", "cpu"])
def test_direct_super_resolution(merged_by, backend_device):
    """A window of 9 by 5 on the own grid and one of 5 by 5 on a grid three times coarser."""
    backend_device(merged_by)
    q, k, v = (random(1, 2, 12 * 15, 8) for _ in range(3))
    coarse_k, coarse_v = random(1, 2, 4 * 5, 8), random(1, 2, 4 * 5, 8)
    inputs = (q, k, v, coarse_k, coarse_v)

    def ours():
        backend = None if merged_by == "reference" else merged_by
        x, fine_k, fine_v, far_k, far_v = (
            i.to(torch.float64 if backend is None else torch.float32) for i in inputs
        )
        options = {"scale": 1.0, "return_lse": True, "backend": backend}
        own = local_attention_2d(x, fine_k, fine_v, (12, 15), (9, 5), **options)
        far = local_attention_2d(x, far_k, far_v, (4, 5), (5, 5), query_scale=3, **options)
        return merge_attention([own[0], far[0]], [own[1], far[1]], backend=backend).double()

    def theirs():
        return joint_attention(
            window_slots(q, k, v, (12, 15), (9, 5)), window_slots(q, coarse_k, coarse_v, (4, 5), (5, 5), 3)
        )

    if merged_by == "reference":
        both(inputs, ours, theirs)
    else:
        torch.testing.assert_close(ours(), theirs(), atol=1e-4, rtol=1e-4)


def test_iterative_super_resolution():
    """A window of 9 by 5 on the own grid, and all text that is no padding: one call."""
    q, k, v = (random(2, 2, 10 * 12, 8) for _ in range(3))
    text_k, text_v = random(2, 2, 7, 8), random(2, 2, 7, 8)
    mask = torch.tensor([[True] * 7, [False, False, True, True, True, True, True]])
    both(
        (q, k, v, text_k, text_v),
        lambda: local_attention_2d(
            q, k, v, (10, 12), (9, 5), extra_k=text_k, extra_v=text_v, extra_mask=mask, scale=1.0
        ),
        lambda: joint_attention(window_slots(q, k, v, (10, 12), (9, 5)), text_slots(q, text_k, text_v, mask)),
    )


def test_causal_window_of_77_slots_with_49_cross_slots():
    q, k, v = (random(1, 2, 12 * 12, 8) for _ in range(3))
    coarse_k, coarse_v = random(1, 2, 6 * 6, 8), random(1, 2, 6 * 6, 8)
    own_slots = window_slots(q, k, v, (12, 12), (17, 9), causal=True)
    cross_slots = window_slots(q, coarse_k, coarse_v, (6, 6), (7, 7), 2)
    assert own_slots[0].shape[3] == 77 and cross_slots[0].shape[3] == 49

    def ours():
        own = local_attention_2d(q, k, v, (12, 12), (17, 9), causal=True, scale=1.0, return_lse=True)
        cross = local_attention_2d(
            q, coarse_k, coarse_v, (6, 6), (7, 7), query_scale=2, scale=1.0, return_lse=True
        )
        return merge_attention([own[0], cross[0]], [own[1], cross[1]])

    both((q, k, v, coarse_k, coarse_v), ours, lambda: joint_attention(own_slots, cross_slots))


# ---- every backend against the reference


def with_gradients(function, outputs, lses, dout, dlse):
    leaves = [x.detach().requires_grad_() for x in (*outputs, *lses)]
    results = function(leaves[: len(outputs)], leaves[len(outputs) :])
    return [x.detach() for x in (*results, *torch.autograd.grad(results, leaves, (dout, dlse)))]


@pytest.mark.budget
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [{}, {"count": 1, "D": 80}, {"count": 3, "D": 80}, {"count": 4, "D": 3}, {"count": 6, "T": 70}],
    ids=str,
)
@pytest.mark.parametrize("backend", KERNELS)
def test_forward_and_backward(backend, case, dtype, backend_device):
    outputs, lses = make(**case, dtype=dtype, device=backend_device(backend))
    dout, dlse = torch.randn_like(outputs[0]), torch.randn_like(lses[0])
    call = lambda o, s: merge_attention(o, s, return_lse=True, backend=backend)  # noqa: E731
    ours = with_gradients(call, outputs, lses, dout, dlse)
    count = len(outputs)

    def reference(*tensors):
        outputs, (dout, *lses, dlse) = tensors[:count], tensors[count:]
        return with_gradients(merge_attention_reference, outputs, lses, dout, dlse)

    truth, eager = judge(reference, [*outputs, dout, *lses, dlse])
    for i, (a, e, t) in enumerate(zip(ours, eager, truth, strict=True)):
        of_lse = i == 1 or i >= 2 + count
        factor = GRADIENT if i > 1 else OUTPUT
        if of_lse and dtype != torch.float32:
            torch.testing.assert_close(a.double(), t, atol=4 * torch.finfo(dtype).eps, rtol=2e-2)
        else:
            assert_within_budget(
                a, e, t, dtype=torch.float32 if of_lse else dtype, factor=factor, name=str(i)
            )


@pytest.mark.parametrize("backend", ALL)
def test_a_query_that_saw_nothing(backend, backend_device):
    outputs, lses = make(B=1, H=1, T=3, D=4, device=backend_device(backend))
    lses[0][..., 0] = lses[0][..., 1] = lses[1][..., 1] = -torch.inf
    out, lse, *gradients = with_gradients(
        lambda o, s: merge_attention(o, s, return_lse=True, backend=backend), outputs, lses,
        torch.ones_like(outputs[0]), torch.ones_like(lses[0]),
    )  # fmt: skip
    torch.testing.assert_close(out[..., 0, :], outputs[1][..., 0, :])
    assert not out[..., 1, :].any() and torch.equal(lse[..., 1], lses[0][..., 1])
    assert all(bool(x.isfinite().all()) for x in gradients)


@pytest.mark.parametrize("backend", ALL)
def test_one_attention_is_its_own_merge_in_memory_of_its_own(backend, backend_device):
    (output,), (lse,) = make(count=1, device=backend_device(backend))
    lse[0, 0, 0] = -torch.inf
    leaf = output.clone().requires_grad_()
    given = leaf.sigmoid()  # which its backward pass reads again
    expected = given.detach().clone()
    expected[0, 0, 0] = 0
    merged, joint = merge_attention([given], [lse], return_lse=True, backend=backend)
    assert torch.equal(merged, expected) and torch.equal(joint, lse)
    merged.mul_(2)
    joint.zero_()
    assert lse[0, 0, 0] == -torch.inf
    merged.sum().backward()


@pytest.mark.parametrize("backend", KERNELS)
def test_weights_far_from_zero(backend, backend_device):
    """An lse of 30,000 has a last place of 0.002: weights come from the differences of the lses alone."""
    outputs, lses = make(T=9, device=backend_device(backend))
    far = [x.round(decimals=0) for x in lses]  # so that 30,000 more is exact
    near, shifted = (
        with_gradients(
            lambda o, s: merge_attention(o, s, return_lse=True, backend=backend), outputs, given,
            torch.ones_like(outputs[0]), torch.zeros_like(lses[0]),
        )
        for given in (far, [x + 30_000 for x in far])
    )  # fmt: skip
    for i in (0, 2, 3, 4, 5):
        torch.testing.assert_close(near[i], shifted[i], atol=0, rtol=0)


@pytest.mark.parametrize("backend", KERNELS)
def test_strides_and_large_lses(backend, backend_device):
    outputs, lses = make(device=backend_device(backend))
    odd = [
        outputs[0].transpose(1, 2).contiguous().transpose(1, 2),
        outputs[1].transpose(2, 3).contiguous().transpose(2, 3),
    ]
    far = [lses[0].transpose(1, 2).contiguous().transpose(1, 2) + 3e4, lses[1] - 3e4]
    out = merge_attention(odd, far, backend=backend)
    torch.testing.assert_close(out, outputs[0])
    assert out.transpose(1, 2).is_contiguous(), "the output keeps the order of the first in memory"


def test_every_instruction_set_and_thread_count(instruction_set):
    outputs, lses = make(T=200, D=44)
    expected = merge_attention(outputs, lses, backend="reference")
    before = torch.get_num_threads()
    try:
        for isa in ("portable", "avx2"):
            instruction_set(isa)
            runs = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                runs.append(merge_attention(outputs, lses, backend="cpu"))
            assert torch.equal(*runs)
            torch.testing.assert_close(runs[0], expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 3])
def test_opcheck(count, backend_device):
    backend_device("cpu")
    outputs, lses = ([x.requires_grad_() for x in tensors] for tensors in make(count=count, T=5))
    nothing = [None] * (4 - count)
    arguments = (*outputs, *nothing, *lses, *nothing, "cpu")
    torch.library.opcheck(merge_attention_op._overload, arguments)


def test_errors_name_the_argument():
    outputs, lses = make()

    def fails(error, words, outputs=outputs, lses=lses, **options):
        with pytest.raises(error, match=words):
            merge_attention(outputs, lses, **options)

    fails(TypeError, "outputs must be a list or tuple", outputs=outputs[0])
    fails(ValueError, "as many, at least 1 each, got 2 and 1", lses=lses[:1])
    fails(ValueError, "got 0 and 0", outputs=[], lses=[])
    fails(ValueError, r"outputs\[0\] must have shape \[B, H, T, D\]", outputs=[x[0] for x in outputs])
    fails(TypeError, r"outputs\[1\] must be torch.float32", outputs=[outputs[0], outputs[1].half()])
    fails(TypeError, r"lses\[0\] must be torch.float32", lses=[x.double() for x in lses])
    fails(ValueError, r"lses\[1\] must have shape \(2, 3, 37\)", lses=[lses[0], lses[1][:1]])
    fails(NotImplementedError, "no sdpa backend", backend="sdpa")


# ---- the triton backend


def test_triton_takes_head_sizes_up_to_1024(backend_device):
    outputs, lses = make(T=1, D=1025, device=backend_device("triton"))
    with pytest.raises(NotImplementedError, match="head sizes up to 1024, got 1025; use backend='reference'"):
        merge_attention(outputs, lses, backend="triton")


@pytest.mark.parametrize(("arch", "dtype"), [(80, torch.float32), (90, torch.bfloat16)], ids=str)
def test_compiles_for_sm80_and_sm90(arch, dtype):
    """No spills, and rows are read by 16 bytes."""
    calls = [
        Call(
            "merge_attention",
            tuple(
                [meta(*shape, dtype=kind, grad=True) for _ in range(count)]
                for shape, kind in (((2, 8, 1000, D), dtype), ((2, 8, 1000), torch.float32))
            ),
            {"return_lse": count == 2},
            arch,
        )
        for count, D in ((1, 64), (2, 64), (4, 1024))
    ]
    reports = compile_calls(calls)
    assert_clean(reports)
    assert {r.name for r in reports} == {"fwd_kernel", "bwd_kernel"}
    assert all("ld.global.v4.b32" in r.ptx.replace("ld.global.nc", "ld.global") for r in reports)


def test_heads_without_elements_have_a_joint_lse():
    outputs, lses = [torch.ones(1, 2, 3, 0)] * 2, [torch.zeros(1, 2, 3)] * 2
    _, lse = merge_attention(outputs, lses, return_lse=True)
    torch.testing.assert_close(lse, torch.full((1, 2, 3), math.log(2)))
    with pytest.raises(NotImplementedError, match="head size of 1 or more"):
        merge_attention(outputs, lses, backend="cpu")
