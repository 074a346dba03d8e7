# SPDX-License-Identifier: Apache-2.0
"""Samples padded on the left: a sample gives what it gives without its padding."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cogview_kernels import ThreeRegionLayout, _backends, decode_attention, three_region_attention
from cogview_kernels.three_region_attention import launch_config
from tests.kernels.test_three_region_attention import check_against_reference, with_gradients

B, H, T, D = 3, 2, 39, 32
STARTS = torch.tensor([0, 21, T])  # none, in the middle of a block, nothing but padding
BACKENDS = ["sdpa", "reference", "cpu", "triton", "cuda"]
SIDES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_sides"])


@pytest.fixture(autouse=True)
def _small_tiles_in_the_interpreter(monkeypatch):
    if _backends.TRITON_INTERPRETED:
        monkeypatch.setattr(launch_config, "choose", lambda *_: launch_config.Config(32, 16, 4, 1))


def dtype_of(backend):
    return torch.float16 if backend == "cuda" else torch.float32


def heads(count, dtype, device, rows=T):
    return torch.randn(B, count, rows, D).to(device, dtype)


def layout_of(device, causal=True):
    """Pivots before a sample's start are none."""
    pivots = torch.stack([torch.randperm(T)[:19] for _ in range(B)])
    pivots[0, 3] = -1
    return ThreeRegionLayout(pivots.to(device), 4, 2, 0.7, causal=causal)


def alone(b, x, layout):
    """A sample's tensors without its padding, and its layout."""
    start = int(STARTS[b])
    pivots = layout.pivots[b : b + 1] - start
    pivots = pivots.masked_fill(pivots < 0, -1)
    parts = [part[b : b + 1, :, start:] for part in x]
    return parts, ThreeRegionLayout(pivots, 4, 2, 0.7, causal=layout.causal)


@SIDES
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_gives_what_it_gives_alone(backend, causal, backend_device):
    device, dtype = backend_device(backend), dtype_of(backend)
    layout = layout_of(device, causal)
    x = [heads(count, dtype, device) for count in (H, 1, 1)]
    dout = heads(H, dtype, device)
    options = {"scale": 0.4, "backend": backend}
    found = with_gradients(three_region_attention, *x, layout, dout=dout, starts=STARTS.to(device), **options)
    tolerance = 4e-3 if dtype == torch.float16 else 1e-5
    for b, start in enumerate(STARTS.tolist()):
        assert not any(bool(y[b, :, :start].any()) for y in found), "nothing comes from padding"
        if start == T:
            continue
        (*qkv, grad), sample = alone(b, [*x, dout], layout)
        expected = with_gradients(three_region_attention, *qkv, sample, dout=grad, **options)
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a[b : b + 1, :, start:], e, atol=tolerance, rtol=tolerance)


@pytest.mark.budget
@SIDES
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_dropout_lse_and_the_error_budget(backend, causal, backend_device):
    """Samples that begin at once, in the middle of tiles, and in the last tile."""
    case = {"B": 3, "T": 77, "Hkv": 1, "w": 8, "W": 2, "P": 30, "causal": causal}
    check_against_reference(
        backend, case, dtype_of(backend), backend_device(backend), dropout_p=0.3, lse=True,
        starts=[0, 21, 71],
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_of_padding_is_minus_infinity(backend, backend_device):
    if backend == "sdpa":
        pytest.skip("the sdpa backend has no lse")
    device = backend_device(backend)
    q = heads(2, dtype_of(backend), device)
    starts = STARTS.int().to(device)
    _, lse = three_region_attention(
        q, q, q, layout_of(device), starts=starts, return_lse=True, backend=backend
    )
    padding = torch.arange(T, device=device) < starts[:, None]
    assert torch.equal(lse == -torch.inf, padding[:, None].expand_as(lse))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_start_is_a_start_of_0(backend, backend_device):
    """So is one before 0; one past the end is the end."""
    device = backend_device(backend)
    q, layout = heads(2, dtype_of(backend), device), layout_of(device)
    whole = three_region_attention(q, q, q, layout, backend=backend)
    starts = torch.tensor([0, -3, T + 5], device=device)
    padded = three_region_attention(q, q, q, layout, starts=starts, backend=backend)
    torch.testing.assert_close(padded[:2], whole[:2])
    assert not padded[2].any()


@pytest.mark.parametrize("with_layout", [False, True])
@pytest.mark.parametrize("Tq", [1, 3])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_decoding_gives_the_last_rows(backend, Tq, with_layout, backend_device):
    device, dtype = backend_device(backend or "cpu"), dtype_of(backend)
    q, k, v = (heads(count, dtype, device) for count in (H, 1, 1))
    starts = STARTS.to(device)
    layout = layout_of(device) if with_layout else ThreeRegionLayout(starts.new_empty(B, 0), T, 1)
    wide = (x.float() for x in (q, k, v))
    expected = three_region_attention(*wide, layout, starts=starts, backend="reference").to(dtype)
    for b, start in enumerate(STARTS.tolist()):  # the padding is never looked at
        k[b, :, :start] = v[b, :, :start] = torch.nan
    lengths = torch.tensor([23, T, T - 1])
    last = torch.stack([q[b, :, n - Tq : n] for b, n in enumerate(lengths.tolist())])
    layout = layout if with_layout else None
    out = decode_attention(last, k, v, lengths.to(device), layout=layout, starts=starts, backend=backend)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(out[b], expected[b, :, n - Tq : n], atol=tolerance, rtol=tolerance)


def test_decoding_refuses_layouts_that_look_ahead():
    q = torch.ones(1, 1, 4, 8)
    layout = ThreeRegionLayout(torch.tensor([[0]]), 2, 1, causal=False)
    for backend in (None, "cpu", "sdpa", "reference"):
        with pytest.raises(ValueError, match="decode_attention: layout must be causal, got causal=False"):
            decode_attention(q, q, q, torch.tensor([4]), layout=layout, backend=backend)


@SIDES
def test_flops_are_those_of_what_is_seen(causal):
    q, layout = heads(2, torch.float32, "cpu"), layout_of("cpu", causal)
    window, far = layout.regions(torch.arange(T), T, STARTS)
    with FlopCounterMode(display=False) as counter:
        three_region_attention(q, q, q, layout, starts=STARTS, backend="cpu")
    assert counter.get_total_flops() == 4 * D * 2 * int((window | far).sum())
    if causal:
        seen = int((window | far)[:, -3:].sum())
        with FlopCounterMode(display=False) as counter:
            lengths = torch.full((B,), T)
            decode_attention(q[:, :, -3:], q, q, lengths, layout=layout, starts=STARTS, backend="cpu")
        assert counter.get_total_flops() == 4 * D * 2 * seen


@pytest.mark.parametrize("op", ["three_region_attention", "decode_attention"])
def test_it_compiles_with_starts_that_change(op):
    layout = layout_of("cpu")

    def call(x, starts):
        if op == "decode_attention":
            return decode_attention(x[:, :, -2:], x, x, starts * 0 + T, layout=layout, starts=starts)
        return three_region_attention(x, x, x, layout, starts=starts)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = heads(2, torch.float32, "cpu")
    for starts in (STARTS, STARTS.flip(0)):
        torch.testing.assert_close(compiled(x, starts), call(x, starts))


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
