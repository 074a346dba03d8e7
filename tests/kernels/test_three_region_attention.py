# SPDX-License-Identifier: Apache-2.0
"""three_region_attention: the reference by plain loops and by properties, then every backend against it."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

from cogview_kernels import (
    ThreeRegionLayout,
    _backends,
    _device,
    _dropout,
    _extension,
    three_region_attention,
)
from cogview_kernels._dropout import Dropout
from cogview_kernels.three_region_attention import launch_config, sdpa
from cogview_kernels.three_region_attention.reference import three_region_attention_reference
from tests.helpers.attention import brute_force_attention
from tests.helpers.tolerance import GRADIENT, OUTPUT, assert_within_budget, judge

KERNELS = ["cpu", "triton"]
BACKENDS = ["sdpa", *KERNELS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _large_tiles_in_the_interpreter(monkeypatch):
    """A tile of any size takes it about as long; a GPU runs the shipped sizes."""
    if _backends.TRITON_INTERPRETED:
        monkeypatch.setattr(launch_config, "choose", lambda *_: launch_config.Config(128, 128, 4, 1))


def make(
    B=1, H=2, Hkv=None, T=23, D=32, w=4, W=2, pivots=None, P=0, bias=0.7, causal=True,
    dtype=torch.float32, device="cpu",
):  # fmt: skip
    """Tensors large enough that every term matters, and a layout with ``pivots`` or ``P`` random ones."""
    if pivots is None:
        pivots = torch.stack([torch.randperm(T)[:P] for _ in range(B)])
    pivots = torch.as_tensor(pivots, device=device, dtype=torch.int64)
    layout = ThreeRegionLayout(pivots, w, W, bias, causal=causal)
    shapes = [(B, H, T, D), (B, Hkv or H, T, D), (B, Hkv or H, T, D)]
    q, k, v = (torch.randn(s).to(dtype).to(device) for s in shapes)
    return q, k, v, layout


def regions(layout):
    """The flat arguments of the op, up to ``starts``."""
    numbers = layout.block_size, layout.window_blocks, layout.pivot_bias, layout.density
    return layout.pivots, *numbers, layout.causal, None


SMALL = {
    "remainder": {"P": 6},
    "any_order_and_pads": {"B": 2, "pivots": [[-1, 17, 0, 5, -1], [8, 22, -1, 2, 11]]},
    "different_counts": {"B": 3, "T": 19, "w": 3, "W": 1, "pivots": [[0, 1, 2], [11, -1, -1], [-1, -1, -1]]},
    "no_pivots": {"P": 0, "W": 1},
    "one_position": {"T": 1, "P": 1},
    "window_past_the_start": {"B": 2, "H": 4, "T": 12, "w": 8, "W": 6, "P": 5},
    "blocks_of_one": {"T": 11, "w": 1, "W": 3, "P": 4},
    "all_are_pivots": {"T": 33, "w": 4, "W": 1, "P": 33},
    "odd_blocks_of_seven": {"T": 40, "w": 7, "W": 2, "P": 13},
    "grouped_heads": {"H": 6, "Hkv": 2, "P": 7},
    "one_key_head": {"H": 3, "Hkv": 1, "P": 7, "bias": 0.0},
    "both_sides": {"B": 2, "T": 47, "Hkv": 1, "pivots": [[46, 3, -1, 20, 9, -1], [-1] * 6], "causal": False},
    "both_sides_windows_apart": {"T": 45, "w": 3, "W": 1, "P": 40, "causal": False},
}


# ---- the reference


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("case", SMALL)
def test_reference_by_plain_loops(case, dropout_p):
    q, k, v, layout = make(**{"D": 4, **SMALL[case]}, dtype=torch.float64)
    seed = 0x1234_5678_9ABC
    expected = brute_force_attention(q, k, v, layout, 0.4, dropout_p, seed)
    out = three_region_attention_reference(q, k, v, layout, 0.4, Dropout.of(dropout_p, torch.tensor(seed)))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("case", ["any_order_and_pads", "grouped_heads", "one_position"])
def test_reference_gradient(case, dropout_p):
    q, k, v, layout = make(**{"D": 3, **SMALL[case], "T": SMALL[case].get("T", 23)}, dtype=torch.float64)
    tensors = [x[:, :, :23].requires_grad_() for x in (q, k, v)]
    call = lambda *qkv: three_region_attention(  # noqa: E731
        *qkv, layout, dropout_p=dropout_p, seed=7, return_lse=True, backend="reference"
    )
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


def test_scale_defaults_to_one_over_root_d():
    q, k, v, layout = make(P=5, D=16)
    out = three_region_attention(q, k, v, layout, backend="reference")
    torch.testing.assert_close(out, three_region_attention(q, k, v, layout, scale=0.25, backend="reference"))


def test_dropout_keeps_the_mean_and_follows_the_seed():
    q, k, v, layout = make(H=8, T=60, P=20, D=16)
    call = lambda seed: three_region_attention(  # noqa: E731
        q, k, torch.ones_like(v), layout, dropout_p=0.25, seed=seed, backend="reference"
    )
    assert torch.equal(call(3), call(3)) and not torch.equal(call(3), call(4))
    assert torch.equal(call(3), call(torch.tensor(3)))
    assert float(call(3).mean()) == pytest.approx(1.0, abs=0.03)
    torch.manual_seed(1)
    first, second = call(None), call(None)
    torch.manual_seed(1)
    assert torch.equal(first, call(None)) and not torch.equal(first, second)


def test_while_a_graph_is_captured_the_device_draws_the_seed(monkeypatch):
    elsewhere = torch.device("meta")
    assert _dropout.as_seed(0.1, None, elsewhere).device.type == "cpu"
    monkeypatch.setattr(_device, "is_capturing", lambda device: device == elsewhere)
    assert _dropout.as_seed(0.1, None, elsewhere).device.type == "meta"
    assert _dropout.as_seed(0.1, 3, elsewhere).device.type == "cpu"


@pytest.mark.gpu
def test_each_replay_of_a_graph_drops_others():
    q, k, v, layout = make(device="cuda", dtype=torch.float16, T=256, P=32, D=64)

    def call():
        return three_region_attention(q, k, v, layout, dropout_p=0.5)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(out.clone())
    assert not torch.equal(*replays)


# ---- properties of every backend


ALL = ["reference", *BACKENDS]


@pytest.mark.parametrize("backend", ALL)
def test_rows_sum_to_one(backend, backend_device):
    """With ones for values a key counted twice, or none, or an unnormalised row would show."""
    q, k, v, layout = make(B=2, T=700, w=64, W=2, P=150, D=32, device=backend_device(backend))
    out = three_region_attention(q, k, torch.ones_like(v), layout, backend=backend)
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("backend", ALL)
def test_every_key_counts_once(backend, backend_device):
    """Equal logits and one-hot values: the output lists each key's weight, 1 / (keys seen)."""
    T, device = 96, backend_device(backend)
    layout = ThreeRegionLayout(torch.tensor([[95, 3, 20, 40, 41, 0, -1]], device=device), 16, 2, 0.0)
    q, k = torch.zeros(1, 1, T, T, device=device), torch.randn(1, 1, T, T, device=device)
    out = three_region_attention(q, k, torch.eye(T, device=device)[None, None], layout, backend=backend)
    mask = layout.dense_mask(T).float()
    torch.testing.assert_close(out[0], mask / mask.sum(-1, keepdim=True))


@pytest.mark.parametrize("backend", ALL)
def test_a_constant_added_to_all_keys_changes_nothing(backend, backend_device):
    q, k, v, layout = make(T=700, w=64, W=2, P=150, device=backend_device(backend))
    shifted = k + torch.randn(k.shape[-1], device=k.device)
    torch.testing.assert_close(
        three_region_attention(q, shifted, v, layout, backend=backend),
        three_region_attention(q, k, v, layout, backend=backend),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("backend", ALL)
def test_a_pivot_in_the_window_changes_nothing(backend, backend_device):
    """Positions of the last two blocks are in the window of all that see them."""
    q, k, v, layout = make(T=600, w=64, W=2, pivots=[[3, 200, 77, -1]], device=backend_device(backend))
    more = ThreeRegionLayout(torch.tensor([[3, 599, 200, 77, 530]], device=q.device), 64, 2, 0.7)
    torch.testing.assert_close(
        three_region_attention(q, k, v, more, backend=backend),
        three_region_attention(q, k, v, layout, backend=backend),
    )


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(("T", "w", "W"), [(600, 128, 6), (65, 64, 2), (40, 64, 1)])
def test_a_window_over_everything_is_causal_attention(backend, T, w, W, backend_device):
    q, k, v, layout = make(T=T, w=w, W=W, P=30, device=backend_device(backend))
    torch.testing.assert_close(
        three_region_attention(q, k, v, layout, backend=backend),
        scaled_dot_product_attention(q, k, v, is_causal=True),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("options", [{}, {"starts": torch.tensor([37, 0])}], ids=["all", "starts"])
def test_no_layout_is_causal_attention(backend, options, backend_device):
    q, k, v, layout = make(B=2, T=150, w=150, W=1, device=backend_device(backend))
    options = {name: x.to(q.device) for name, x in options.items()}

    def results(regions, backend, q=q):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = three_region_attention(*leaves, regions, backend=backend, **options)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    results(None, backend, torch.full_like(q, torch.nan))  # what this leaves in memory must not be read
    for found, expected in zip(results(None, backend), results(layout, "reference"), strict=True):
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("backend", ALL)
def test_a_window_over_everything_to_both_sides_is_dense_attention(backend, backend_device):
    q, k, v, layout = make(T=65, w=64, W=2, P=30, causal=False, device=backend_device(backend))
    torch.testing.assert_close(
        three_region_attention(q, k, v, layout, backend=backend),
        scaled_dot_product_attention(q, k, v),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("backend", ALL)
def test_both_sides_are_alike(backend, backend_device):
    """Whole blocks turned round give the output turned round, since nothing tells left from right."""
    q, k, v, layout = make(T=576, w=64, W=2, P=70, causal=False, device=backend_device(backend))
    turned = ThreeRegionLayout(575 - layout.pivots, 64, 2, layout.pivot_bias, causal=False)
    torch.testing.assert_close(
        three_region_attention(*(x.flip(2) for x in (q, k, v)), turned, backend=backend).flip(2),
        three_region_attention(q, k, v, layout, backend=backend),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("backend", ALL)
def test_pivots_in_any_order_and_integer_type(backend, backend_device):
    q, k, v, layout = make(T=600, w=32, W=2, P=70, device=backend_device(backend))
    expected = three_region_attention(q, k, v, layout, backend=backend)
    ordered = layout.pivots.sort(1).values
    for pivots in (ordered, ordered.flip(1), ordered.int(), ordered.short()):
        again = ThreeRegionLayout(pivots, 32, 2, layout.pivot_bias)
        torch.testing.assert_close(three_region_attention(q, k, v, again, backend=backend), expected)


# ---- every backend against the reference


# Tiles have 16 to 128 queries and keys: sizes below, at and past an edge, and two tiles and a remainder.
LARGE = {
    "at_an_edge": {"T": 256, "w": 64, "W": 2, "P": 64, "D": 64},
    "past_an_edge": {"T": 257, "w": 64, "W": 1, "P": 65, "D": 64},
    # The CPU backward deals a head of 512 queries and more to several sums.
    "two_tiles_and_a_bit": {"B": 2, "H": 1, "T": 523, "w": 128, "W": 2, "P": 261, "D": 64},
    "odd_blocks": {"T": 413, "w": 100, "W": 3, "P": 131, "D": 80, "Hkv": 1},
    "small_blocks": {"T": 290, "w": 24, "W": 3, "P": 63, "D": 96},
    "D32": {"T": 190, "w": 32, "W": 2, "P": 40, "D": 32, "H": 4, "Hkv": 2},
    "D128": {"T": 290, "w": 64, "W": 2, "P": 129, "D": 128},
    "D256": {"T": 290, "w": 128, "W": 1, "P": 127, "D": 256, "H": 1},
    "both_sides_of_many": {"H": 1, "T": 523, "w": 48, "W": 1, "P": 261, "D": 64, "causal": False},
}


def _skip_what_widens_alike(backend, dtype):
    if backend == "triton" and dtype == torch.float16 and _backends.TRITON_INTERPRETED:
        pytest.skip("the interpreter computes both 16-bit dtypes in float32: bfloat16 shows it")


def with_gradients(function, q, k, v, *arguments, dout, dlse=None, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    result = function(*leaves, *arguments, **options)
    results, grads = ((result,), (dout,)) if dlse is None else (result, (dout, dlse))
    gradients = torch.autograd.grad(results, leaves, grads)
    return [x.detach() for x in (*results, *gradients)]


def check_against_reference(backend, case, dtype, device, *, dropout_p=0.0, lse=False, starts=None):
    q, k, v, layout = make(**case, dtype=dtype, device=device)
    starts = None if starts is None else torch.tensor(starts, device=device)
    dout = torch.randn(q.shape).to(q)
    dlse = torch.randn(q.shape[:3]).to(device) if lse else None
    scale = 1.3 / q.shape[-1] ** 0.5
    options = {"dropout_p": dropout_p, "seed": 11 << 33 | 5} if dropout_p else {}
    if starts is not None:
        options["starts"] = starts
    ours = with_gradients(
        three_region_attention, q, k, v, layout, dout=dout, dlse=dlse, scale=scale, return_lse=lse,
        backend=backend, **options,
    )  # fmt: skip

    dropout = Dropout.of(dropout_p, torch.tensor(options.get("seed", 0)))

    def reference(q, k, v, dout):
        def call(q, k, v):
            out, log_sum = three_region_attention_reference(q, k, v, layout, scale, dropout, starts)
            return (out, log_sum) if lse else out

        return with_gradients(call, q, k, v, dout=dout, dlse=dlse.to(q.dtype) if lse else None)

    truth, eager = judge(reference, [q, k, v, dout])
    names = ["out", "lse", "dq", "dk", "dv"] if lse else ["out", "dq", "dk", "dv"]
    for name, a, e, t in zip(names, ours, eager, truth, strict=True):
        if name == "lse":
            assert a.dtype == torch.float32
            torch.testing.assert_close(
                a.double(), t, atol=2e-3 if dtype != torch.float32 else 1e-5, rtol=1e-5
            )
            continue
        if not bool(t.any()):  # one key alone: its gradient is a difference of equals
            torch.testing.assert_close(a.double(), t, atol=16 * torch.finfo(dtype).eps, rtol=0)
            continue
        factor = GRADIENT if name.startswith("d") else OUTPUT
        assert_within_budget(a, e, t, dtype=dtype, factor=factor, name=name)


@pytest.mark.budget
@pytest.mark.parametrize("case", [*SMALL, *LARGE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(backend, dtype, case, backend_device, monkeypatch):
    if case in LARGE:
        _skip_what_widens_alike(backend, dtype)
    if backend == "sdpa":
        monkeypatch.setattr(sdpa, "DENSE_LENGTH", 0)
    check_against_reference(backend, {**SMALL, **LARGE}[case], dtype, backend_device(backend))


@pytest.mark.budget
@pytest.mark.parametrize("tiles", [(16, 16), (32, 16), (16, 32)], ids=str)
@pytest.mark.parametrize(
    "case",
    ["remainder", "different_counts", "odd_blocks_of_seven", "grouped_heads", "both_sides_windows_apart"],
)
def test_small_triton_tiles(case, tiles, backend_device, monkeypatch):
    """Several tiles each way, inside, at and across the borders of window blocks."""
    monkeypatch.setattr(launch_config, "choose", lambda *_: launch_config.Config(*tiles, 4, 1))
    case = {**SMALL[case], "T": SMALL[case].get("T", 23) + 17, "H": SMALL[case].get("H", 1)}
    check_against_reference("triton", case, torch.float32, backend_device("triton"), dropout_p=0.3, lse=True)


@pytest.mark.budget
@pytest.mark.parametrize(
    "case", ["any_order_and_pads", "grouped_heads", "all_are_pivots", "no_pivots", "D128", "both_sides"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_dropout_and_lse(backend, dtype, case, backend_device):
    _skip_what_widens_alike(backend, dtype)
    case = {**SMALL, **LARGE}[case]
    check_against_reference(backend, case, dtype, backend_device(backend), dropout_p=0.3, lse=True)


@pytest.mark.parametrize("backend", KERNELS)
def test_dropout_draws_the_mask_of_the_reference(backend, backend_device):
    """Equal logits and one-hot values: the output is the dropout mask itself, over pivots and window."""
    T, p, seed, device = 96, 0.4, -(0x1234_5678_9ABC), backend_device(backend)
    layout = ThreeRegionLayout(torch.tensor([[95, 3, 20, 40, 41, 0, -1]] * 2, device=device), 16, 2, 0.0)
    q, k = torch.zeros(2, 3, T, T, device=device), torch.randn(2, 3, T, T, device=device)
    v = torch.eye(T, device=device).expand(2, 3, T, T)
    call = lambda name, seed: three_region_attention(  # noqa: E731
        q, k, v, layout, dropout_p=p, seed=seed, backend=name
    )
    out = call(backend, seed)
    assert torch.equal(out != 0, call("reference", seed) != 0)
    kept = (out != 0).sum() / layout.dense_mask(T).sum() / 3
    assert float(kept) == pytest.approx(1 - p, abs=0.02)
    assert torch.equal(out, call(backend, torch.tensor(seed, device=device)))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("causal", [True, False])
def test_two_runs_give_the_same_bits(backend, causal, backend_device):
    device = backend_device(backend)
    q, k, v, layout = make(T=300, w=32, W=2, P=100, H=4, Hkv=2, causal=causal, device=device)
    options = {"dropout_p": 0.1, "seed": 5, "backend": backend}
    dout = torch.randn_like(q)
    first, second = (
        with_gradients(three_region_attention, q, k, v, layout, dout=dout, **options) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scale", [-0.4, 0.0])
@pytest.mark.parametrize("backend", KERNELS)
def test_scale_of_any_sign(backend, scale, backend_device):
    q, k, v, layout = make(T=70, w=16, P=20, device=backend_device(backend))
    dout = torch.randn_like(q)
    ours, expected = (
        with_gradients(three_region_attention, q, k, v, layout, dout=dout, scale=scale, backend=name)
        for name in (backend, "reference")
    )
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_gradient_of_lse_alone(backend, backend_device):
    q, k, v, layout = make(T=70, w=16, P=20, Hkv=1, device=backend_device(backend))
    weight = torch.randn(q.shape[:3], device=q.device)
    results = []
    for name in (backend, "reference"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        lse = three_region_attention(*leaves, layout, return_lse=True, backend=name)[1]
        results.append(torch.autograd.grad(lse, leaves, weight, allow_unused=True))
    for ours, expected in zip(*results, strict=True):
        expected = torch.zeros_like(ours) if expected is None else expected
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_strides_of_every_kind(backend, backend_device):
    """A last dimension that is not contiguous costs a copy; an expanded gradient has strides of 0."""
    q, k, v, layout = make(T=70, w=16, P=20, D=32, device=backend_device(backend))
    odd = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    dout = torch.randn(1, device=q.device).expand(q.shape)
    ours = with_gradients(three_region_attention, *odd, layout, dout=dout, backend=backend)
    expected = with_gradients(three_region_attention, q, k, v, layout, dout=dout, backend="reference")
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    out = three_region_attention(
        q.transpose(1, 2).contiguous().transpose(1, 2), k, v, layout, backend=backend
    )
    assert out.transpose(1, 2).is_contiguous(), "the output keeps the order of q in memory"


@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_past_32_bits(backend, backend_device):
    """Rows 2^27 elements apart: the last ones lie past 2^31, in memory that is reserved and never touched."""
    device = backend_device(backend)
    if device.type != "cpu":
        pytest.skip("would take 5 GB of the GPU's memory")
    T, D, step = 20, 32, 2**27
    q, k, v, layout = make(T=T, D=D, H=1, P=8, dtype=torch.float16)
    try:
        storage = torch.UntypedStorage(2 * (T * step + D))
    except RuntimeError:
        pytest.skip("the address space is limited here")
    far = torch.empty(0, dtype=torch.float16).set_(storage, 0, k.shape, (T * step, T * step, step, 1))
    far.copy_(k)
    dout = torch.randn_like(q)
    for spread, near in (((q, far, v), (q, k, v)), ((far, k, v), (k, k, v)), ((q, k, far), (q, k, k))):
        ours = with_gradients(three_region_attention, *spread, layout, dout=dout, backend=backend)
        expected = with_gradients(three_region_attention, *near, layout, dout=dout, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_sdpa_takes_one_call_for_short_sequences(monkeypatch):
    calls = []
    call = sdpa.scaled_dot_product_attention
    monkeypatch.setattr(
        sdpa, "scaled_dot_product_attention", lambda *a, **o: calls.append(o) or call(*a, **o)
    )
    for T, expected in ((sdpa.DENSE_LENGTH, 1), (sdpa.DENSE_LENGTH + 1, 8)):
        calls.clear()
        check_against_reference("sdpa", {"T": T, "w": 64, "W": 2, "P": 20}, torch.float32, "cpu")
        assert len(calls) == expected


@pytest.mark.parametrize("backend", ALL)
def test_packed_projection_is_read_in_place(backend, backend_device):
    layout = make(B=2, T=600, w=64, W=2, P=70, device=backend_device(backend))[3]
    packed = torch.randn(2, 600, 3, 2, 32, device=layout.pivots.device, requires_grad=True)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out = three_region_attention(q, k, v, layout, backend=backend)
    dout = torch.randn_like(out)
    (dpacked,) = torch.autograd.grad(out, packed, dout)
    leaves = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    expected = three_region_attention(*leaves, layout, backend=backend)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(expected, leaves, dout)
    torch.testing.assert_close(dpacked.permute(2, 0, 3, 1, 4), torch.stack(gradients))


@pytest.mark.parametrize("shape", [(0, 2, 30, 32), (2, 2, 0, 32)], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_empty(backend, shape, backend_device):
    device = backend_device(backend)
    leaves = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    pivots = torch.full((shape[0], 3), -1, device=device)
    out = three_region_attention(*leaves, ThreeRegionLayout(pivots, 8, 2), backend=backend)
    out.sum().backward()
    assert out.shape == shape and all(x.grad.shape == shape for x in leaves)


@pytest.mark.parametrize("backend", ALL)
def test_logits_past_the_fp16_limit(backend, backend_device):
    """Products of 200 * 200 * 64 are 2.5 million, 40 times the fp16 limit, and exact in float32."""
    device = backend_device(backend)
    q, k, v, layout = make(T=200, w=32, W=2, P=40, D=64, bias=0.0, dtype=torch.float16, device=device)
    q, k = q.sign() * 200, k.sign() * 200
    truth, _ = three_region_attention_reference(q.double(), k.double(), v.double(), layout, 1.0)
    out = three_region_attention(q, k, v, layout, scale=1.0, backend=backend)
    torch.testing.assert_close(out.double(), truth, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_queries_and_keys_at_the_fp16_limit(backend, dtype, backend_device):
    """One key takes everything: out and dv are copies. dq and dk, which are 0, are rounding times 65,504.

    Peaks are then up to 2^35 in log2, and half an ulp of one is 2^11: an exponent that is off by it makes NaN
    or an infinity of what is 1, or 0. Triton's interpreter rounds fused multiply-adds as a GPU does."""
    if backend == "cuda" and dtype == torch.bfloat16:
        pytest.skip("the cuda backend computes in float16")
    device = backend_device(backend)
    case = {"T": 200, "w": 32, "W": 2, "P": 40, "D": 64, "bias": 0.7, "dtype": torch.float32}
    q, k, v, layout = make(**case, device=device)
    q, k = ((x / x.abs().max() * 65280).to(dtype) for x in (q, k))
    v, dout = v.to(dtype), torch.randn_like(v).to(dtype)
    wide = [x.double() for x in (q, k, v)]
    truth = with_gradients(three_region_attention, *wide, layout, dout=dout.double(), backend="reference")
    found = with_gradients(three_region_attention, q, k, v, layout, dout=dout, backend=backend)
    assert all(bool(x.isfinite().all()) for x in (found[0], found[3]))
    # Where lse is saved as one float32, a peak of 2^35 leaves nothing of the rest.
    for i in (0, 3) if backend == "triton" and dtype == torch.float16 else (0,):
        torch.testing.assert_close(found[i].double(), truth[i], atol=2e-2, rtol=2e-2)


# ---- the cpu backend


@pytest.mark.budget
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_instruction_set(isa, dtype, instruction_set):
    instruction_set(isa)
    for case in (
        SMALL["different_counts"],
        {"T": 129, "w": 64, "W": 1, "P": 33, "D": 64},
        {"T": 157, "w": 25, "W": 3, "P": 71, "D": 80, "Hkv": 1},
        {"T": 135, "w": 32, "W": 1, "P": 40, "D": 256, "H": 1},
        # e^bias is past float32, and lanes are left over beside the last queries.
        {"T": 89, "w": 16, "W": 1, "P": 9, "bias": 88.9},
    ):
        check_against_reference("cpu", case, dtype, "cpu", dropout_p=0.1, lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_thread_count_changes_no_bit(dtype, backend_device):
    backend_device("cpu")
    q, k, v, layout = make(B=2, H=2, Hkv=1, T=700, w=64, W=2, P=150, D=64, dtype=dtype)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(with_gradients(three_region_attention, q, k, v, layout, dout=q, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_workspaces_kept_between_calls_can_be_freed(backend_device):
    backend_device("cpu")
    q, k, v, layout = make(T=300, w=64, W=2, P=30, D=64)
    three_region_attention(q, k, v, layout, backend="cpu")
    assert _extension.native.free_workspaces() > 0
    assert _extension.native.free_workspaces() == 0


@pytest.mark.parametrize(
    ("pivots", "message"),
    [
        ([[1], [8]], r"pivots must lie in \[0, 8\) \(-1 pads\), got 8"),
        ([[2**33], [1]], "got 8589934592"),
        ([[1], [-2]], r"got -2; draw them for this sequence length"),
        ([[1, 2], [7, 7]], "unique within a sample, got 7 twice"),
    ],
    ids=str,
)
def test_cpu_refuses_bad_pivots(pivots, message, backend_device):
    """The op itself does, so that a compiled graph does too."""
    backend_device("cpu")
    x = torch.ones(2, 2, 8, 4)
    layout = ThreeRegionLayout(torch.tensor(pivots), 2, 2)
    with pytest.raises(ValueError, match=message):
        three_region_attention(x, x, x, layout, backend="cpu")
    results = torch.ones(2, 2, 8, 4), torch.ones(2, 2, 8), torch.empty(0, dtype=torch.int32)
    arguments = (*regions(layout), 1.0, 0.0, None, "cpu")
    with pytest.raises(ValueError, match=message):
        torch.ops.cogview_kernels.three_region_attention_backward(
            x, None, x, x, x, *results, *arguments, True, True, True
        )


def test_cpu_refuses_large_heads(backend_device):
    backend_device("cpu")
    x = torch.ones(1, 1, 8, 257)
    with pytest.raises(NotImplementedError, match="head sizes up to 256, got 257; use backend='sdpa'"):
        three_region_attention(x, x, x, ThreeRegionLayout(torch.tensor([[1]]), 2, 2), backend="cpu")


def test_without_a_backend_sdpa_serves_large_heads():
    q, k, v, layout = make(D=257, P=5)
    out = three_region_attention(q, k, v, layout)
    torch.testing.assert_close(out, three_region_attention(q, k, v, layout, backend="reference"))


def test_last_dimension_of_any_stride(backend_device):
    backend_device("cpu")
    q, k, v, layout = make(T=40, w=8, W=2, P=9)
    swapped = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    torch.testing.assert_close(
        with_gradients(three_region_attention, *swapped, layout, dout=v, backend="cpu"),
        with_gradients(three_region_attention, q, k, v, layout, dout=v, backend="cpu"),
    )


# ---- PyTorch integration


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend, backend_device):
    q, k, v, layout = make(T=30, w=8, P=9, Hkv=1, device=backend_device(backend))
    starts = torch.tensor([4], device=q.device)
    arguments = (*regions(layout)[:-1], starts, 0.2, 0.25, torch.tensor(3), backend)
    op, backward = (
        torch.ops.cogview_kernels.three_region_attention,
        torch.ops.cogview_kernels.three_region_attention_backward,
    )
    out, lse, residuals = op(q, k, v, *arguments)
    saved = torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, residuals
    for wanted in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward, (*saved, *arguments, *wanted))
    torch.library.opcheck(op, (*(x.requires_grad_() for x in (q, k, v)), *arguments))


@pytest.mark.parametrize("backend", KERNELS)
def test_op_called_by_name_is_differentiable(backend, backend_device):
    q, k, v, layout = make(T=40, w=8, W=2, P=9, device=backend_device(backend))
    op = torch.ops.cogview_kernels.three_region_attention
    options = (*regions(layout), 0.2, 0.0, None, backend)
    call = lambda q, k, v: op(q, k, v, *options)[0]  # noqa: E731
    expected = lambda q, k, v: three_region_attention(q, k, v, layout, scale=0.2, backend="reference")  # noqa: E731
    torch.testing.assert_close(
        with_gradients(call, q, k, v, dout=v), with_gradients(expected, q, k, v, dout=v), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("backend", ALL)
def test_compile_without_graph_break(backend, backend_device):
    q, k, v, layout = make(T=600, w=64, W=2, P=70, device=backend_device(backend))
    function = lambda q, k, v: three_region_attention(2 * q, k, v, layout, backend=backend) + 1  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    dout = torch.randn_like(q)
    torch.testing.assert_close(
        with_gradients(compiled, q, k, v, dout=dout), with_gradients(function, q, k, v, dout=dout)
    )


# ---- derivatives: right, or an error that names the way out


def _squares(backend, layout, k, v):
    return lambda q: three_region_attention(q, k, v, layout, backend=backend).pow(2).sum()


TRANSFORMS = {
    "create_graph": lambda f, x: torch.autograd.grad(f(x.requires_grad_()), x, create_graph=True)[0].detach(),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.tensor(2.0))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vectorized": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "vmap_of_grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
}
REFUSED = {
    "second": (lambda f, x: second_derivative(f, x), "second derivatives"),
    "grad_of_grad": (
        lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).pow(2).sum())(x),
        "second derivatives",
    ),
    "dual": (lambda f, x: tangent(f, x), "forward-mode derivative"),
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)), "forward-mode derivative"),
    "hessian": (lambda f, x: torch.func.hessian(f)(x), "forward-mode derivative"),
    "functional_hessian": (lambda f, x: torch.autograd.functional.hessian(f, x), "second derivatives"),
}


def second_derivative(f, x):
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(gradient.pow(2).sum() + x.sum(), x)[0]


def tangent(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_transforms_are_right(transform, backend):
    q, k, v, layout = make(T=20, w=4, W=2, P=6, Hkv=1)
    ours, expected = (
        TRANSFORMS[transform](_squares(name, layout, k, v), q.clone()) for name in (backend, "reference")
    )
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transform", REFUSED)
@pytest.mark.parametrize("backend", [None, *KERNELS])
def test_derivatives_that_kernels_lack_are_refused(transform, backend, backend_device):
    """No wrong number: a gradient penalty was one. The reference has them all."""
    device = backend_device(backend or "cpu")
    q, k, v, layout = make(T=20, w=4, W=2, P=6, Hkv=1, device=device)
    call, kind = REFUSED[transform]
    message = f"three_region_attention: its kernels have no {kind}; use backend='reference'"
    with pytest.raises(NotImplementedError, match=message):
        call(_squares(backend, layout, k, v), q)
    call(_squares("reference", layout, k, v), q)


def test_float64_goes_to_plain_pytorch():
    q, k, v, layout = make(T=12, w=4, W=1, P=4, D=8, dtype=torch.float64, device="cpu")
    out = three_region_attention(q, k, v, layout)
    expected = three_region_attention(q, k, v, layout, backend="reference")
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected)
    out, lse = three_region_attention(q, k, v, layout, dropout_p=0.2, seed=1, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64
    call = lambda *x: three_region_attention(*x, layout)  # noqa: E731
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (q, k, v)], fast_mode=True)
    for backend in ("cpu", "triton"):
        if _backends.why_not(backend, q.device):
            continue
        with pytest.raises(NotImplementedError, match=f"{backend} backend takes q in float32.*float64.*sdpa"):
            three_region_attention(q, k, v, layout, backend=backend)


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 2, 8, 4, dtype=torch.int64)}, TypeError, "q must be float32"),
        ({"q": torch.ones(2, 8, 4)}, ValueError, r"q must have shape \[B, H, T, D\], got \(2, 8, 4\)"),
        ({"k": torch.ones(2, 2, 8, 4).half()}, TypeError, "k must have the dtype of q, torch.float32, got"),
        (
            {"k": torch.ones(2, 2, 9, 4)},
            ValueError,
            r"k must have shape \[2, Hkv, 8, 4\] .* got \(2, 2, 9, 4\)",
        ),
        ({"v": torch.ones(2, 1, 8, 4)}, ValueError, r"v must have the shape of k, \(2, 2, 8, 4\), got"),
        (
            {"k": torch.ones(2, 3, 8, 4), "v": torch.ones(2, 3, 8, 4)},
            ValueError,
            "multiple of k's, got 2 and 3",
        ),
        ({"layout": torch.ones(2, 2)}, TypeError, "layout must be a ThreeRegionLayout or None, got Tensor"),
        ({"layout": [[1, 2]]}, ValueError, r"layout.pivots must have shape \[2, P\]"),
        ({"layout": [[1], [8]]}, ValueError, r"pivots must lie in \[0, 8\) \(-1 pads\), got 8"),
        ({"layout": [[1], [-2]]}, ValueError, r"pivots must lie in \[0, 8\) \(-1 pads\), got -2"),
        ({"layout": [[1, 2], [7, 7]]}, ValueError, "unique within a sample, got 7 twice"),
        ({"scale": float("inf")}, ValueError, "scale must be a finite number"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\)"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number, got str"),
        ({"dropout_p": 0.1, "seed": 3.7}, TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
        ({"seed": 3.7}, TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
        ({"dropout_p": 0.1, "seed": True}, TypeError, "seed must be .*, got bool"),
        ({"dropout_p": 0.1, "seed": torch.tensor(1.0)}, TypeError, r"seed must be .*, got torch.float32"),
        ({"dropout_p": 0.1, "seed": torch.tensor(1).int()}, TypeError, "seed must be .*, got torch.int32"),
        ({"dropout_p": 0.1, "seed": torch.tensor([1])}, TypeError, r"got torch.int64 \(1,\)"),
        ({"dropout_p": 0.1, "seed": 2**64}, ValueError, "seed must have at most 64 bits"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"q": torch.ones(2, 2, 8, 4).numpy()}, TypeError, "q must be a tensor, got ndarray"),
        ({"k": torch.ones(2, 2, 8, 4, device="meta")}, ValueError, "k must be on the device of q, cpu, got"),
        (
            {name: torch.ones(2, 2, 8, 0) for name in "qkv"},
            ValueError,
            "q must have a head size of at least 1",
        ),
        ({"backend": "chunked"}, NotImplementedError, "no chunked backend; this op has triton, cuda, cpu"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
        ({"backend": "sdpa", "dropout_p": 0.1}, NotImplementedError, "the sdpa backend has no dropout; use"),
        ({"backend": "sdpa", "return_lse": True}, NotImplementedError, "the sdpa backend has no return_lse"),
    ],
    ids=lambda value: None,
)
def test_errors(change, error, message):
    arguments = {name: torch.ones(2, 2, 8, 4) for name in "qkv"} | {"layout": [[1], [2]]} | change
    if isinstance(arguments["layout"], list):
        arguments["layout"] = ThreeRegionLayout(torch.tensor(arguments["layout"]), 2, 2)
    with pytest.raises(error, match=message):
        three_region_attention(**arguments)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_seeds_of_64_bits_and_seeds_of_tensors_are_one(backend):
    q, k, v, layout = make(T=20, w=4, W=2, P=6)
    call = lambda seed: three_region_attention(  # noqa: E731
        q, k, v, layout, dropout_p=0.3, seed=seed, backend=backend
    )
    assert torch.equal(call(2**64 - 3), call(-3))
    assert torch.equal(call(-3), call(torch.tensor(-3)))
    assert not torch.equal(call(-3), call(3))


def test_the_default_gives_what_is_asked_for():
    q, k, v, layout = make(P=5)
    out, lse = three_region_attention(q, k, v, layout, dropout_p=0.2, seed=3, return_lse=True)
    expected = three_region_attention(
        q, k, v, layout, dropout_p=0.2, seed=3, return_lse=True, backend="reference"
    )
    torch.testing.assert_close((out, lse), expected, atol=1e-5, rtol=1e-5)
