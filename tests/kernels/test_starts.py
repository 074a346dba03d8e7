# SPDX-License-Identifier: Apache-2.0
"""Samples padded on the left: what a sample gives does not depend on its padding."""

from __future__ import annotations

import pytest
import torch

from cogview_kernels import ThreeRegionLayout, decode_attention, three_region_attention

B, H, T, D = 3, 4, 23, 16
STARTS = torch.tensor([0, 9, 14])


def heads(count, dtype=torch.float64):
    return torch.randn(B, count, T, D, dtype=dtype)


def layout_of(pivots, bias=0.7):
    return ThreeRegionLayout(torch.as_tensor(pivots), 4, 2, bias)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_training_attention_equals_brute_force(backend):
    q, k, v = (x.requires_grad_() for x in (heads(H), heads(2), heads(2)))
    layout = layout_of([[0, 1, 9, 14]] * B)
    out = three_region_attention(q, k, v, layout, starts=STARTS, scale=0.4, backend=backend)
    window, far = layout.regions(torch.arange(T), T)
    for b, start in enumerate(STARTS.tolist()):
        assert not out[b, :, :start].any()
        seen = (window | far[b])[start:, start:]
        keys, values = (x[b, :, start:].repeat_interleave(2, 0) for x in (k, v))
        logits = 0.4 * q[b, :, start:] @ keys.transpose(1, 2) + 0.7 * far[b, start:, start:]
        expected = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        torch.testing.assert_close(out[b, :, start:], expected)
    gradients = torch.autograd.grad(out.pow(2).sum(), (q, k, v))
    for b, start in enumerate(STARTS.tolist()):
        for x in gradients:
            assert bool(x[b].isfinite().all()) and not x[b, :, :start].any() and bool(x[b, :, start:].any())


def test_lse_and_dropout_come_from_the_reference():
    q, k, v = heads(H), heads(2), heads(2)
    layout = layout_of([[0, 1, 9, 14]] * B)
    options = {"starts": STARTS.int(), "dropout_p": 0.3, "seed": 3, "return_lse": True}
    out, lse = three_region_attention(q, k, v, layout, **options)
    assert bool((lse[1, :, :9] == -torch.inf).all()) and bool(lse[1, :, 9:].isfinite().all())
    assert bool(out.isfinite().all())


def test_no_start_is_a_start_of_0():
    q, k, v = (x.float() for x in (heads(H), heads(2), heads(2)))
    layout, none = layout_of([[0, 1, 9, 14]] * B), torch.zeros(B, dtype=torch.int64)
    for backend in ("sdpa", "reference"):
        torch.testing.assert_close(
            three_region_attention(q, k, v, layout, starts=none, backend=backend),
            three_region_attention(q, k, v, layout, backend=backend),
        )


@pytest.mark.parametrize("with_layout", [False, True])
@pytest.mark.parametrize("backend", [None, "sdpa", "reference"])
def test_decoding_gives_the_last_rows(backend, with_layout):
    q, k, v = heads(H), heads(2), heads(2)
    layout = layout_of([[0, 1, 9, 14]] * B if with_layout else torch.empty(B, 0, dtype=torch.int64))
    if not with_layout:
        layout = ThreeRegionLayout(layout.pivots, T, 1)
    expected = three_region_attention(q, k, v, layout, starts=STARTS, backend="reference")
    for b, start in enumerate(STARTS.tolist()):  # the padding is never looked at
        k[b, :, :start] = v[b, :, :start] = torch.nan
    lengths = torch.tensor([T, T - 2, 15])
    last = torch.stack([q[b, :, n - 3 : n] for b, n in enumerate(lengths.tolist())])
    out = decode_attention(
        last, k, v, lengths, layout=layout if with_layout else None, starts=STARTS, backend=backend
    )
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(out[b], expected[b, :, n - 3 : n])


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_kernels_refuse_them(backend, backend_device):
    device = backend_device(backend)
    q = torch.ones(1, 1, 4, 32, device=device, dtype=torch.float16)
    starts = torch.zeros(1, dtype=torch.int64, device=device)
    layout = ThreeRegionLayout(torch.tensor([[0]], device=device), 2, 1)
    for call in (
        lambda: three_region_attention(q, q, q, layout, starts=starts, backend=backend),
        lambda: decode_attention(q, q, q, starts + 4, starts=starts, backend=backend),
    ):
        with pytest.raises(NotImplementedError, match=f"the {backend} backend takes no starts; use"):
            call()


@pytest.mark.parametrize(
    ("starts", "error", "message"),
    [
        ([0], TypeError, "starts must be an int32 or int64 tensor, got list"),
        (torch.zeros(1), TypeError, "starts must be .*, got torch.float32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"starts must have shape \[1\], got \(2,\)"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, "starts must be on the device of q"),
    ],
)
def test_errors(starts, error, message):
    q = torch.ones(1, 1, 4, 8)
    layout = ThreeRegionLayout(torch.tensor([[0]]), 2, 1)
    with pytest.raises(error, match=f"three_region_attention: {message}"):
        three_region_attention(q, q, q, layout, starts=starts)
    with pytest.raises(error, match=f"decode_attention: {message}"):
        decode_attention(q, q, q, torch.tensor([4]), starts=starts)
