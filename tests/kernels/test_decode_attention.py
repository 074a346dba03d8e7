# SPDX-License-Identifier: Apache-2.0
"""decode_attention: the last rows of training attention, over a cache with rubbish past its end."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cogview_kernels import ThreeRegionLayout, _extension, decode_attention, three_region_attention
from cogview_kernels.decode_attention import api
from cogview_kernels.decode_attention.reference import decode_attention_reference
from tests.helpers.attention import brute_force_attention
from tests.helpers.tolerance import assert_within_budget, judge
from tests.kernels import test_three_region_attention as attention

KERNELS = ["cpu", "triton"]
BACKENDS = [*KERNELS, "sdpa"]
ALL = ["reference", *BACKENDS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# lengths per sample, cache size S, new queries Tq. Pivots and window take 16 + Tq keys, so that a cache of
# 20 is read whole with several queries, and one of 90 gathered.
CASES = {
    "one_query": ([31], 90, 1),
    "several_lengths": ([31, 8, 20], 90, 1),
    "several_queries": ([31, 7, 12], 90, 7),
    "short_cache": ([20, 3], 20, 3),
    "first_token": ([1], 20, 1),
    "full_cache": ([40], 40, 2),
}
PIVOTS = [9, 0, -1, 2, 5, 17, 3, -1]


def make(case, dtype=torch.float64, device="cpu", H=4, Hkv=2, D=8):
    lengths, S, Tq = CASES[case]
    B, T = len(lengths), max(lengths)
    q, k, v = (torch.randn(B, h, T, D, dtype=torch.float64) for h in (H, Hkv, Hkv))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k_cache, v_cache = (torch.full((B, Hkv, S, D), torch.nan, dtype=dtype) for _ in range(2))
    last = torch.empty(B, H, Tq, D, dtype=dtype)
    for b, n in enumerate(lengths):
        k_cache[b, :, :n], v_cache[b, :, :n] = k[b, :, :n], v[b, :, :n]
        last[b] = q[b, :, n - Tq : n]
    layout = ThreeRegionLayout(torch.tensor([PIVOTS] * B), 4, 2, 0.6)
    moved = [x.to(device) for x in (last, k_cache, v_cache, torch.tensor(lengths))]
    return *moved, layout, (q, k, v)


def on_device(layout, device):
    return ThreeRegionLayout(
        layout.pivots.to(device), layout.block_size, layout.window_blocks, layout.pivot_bias
    )


@pytest.mark.parametrize("backend", [None, "sdpa", "reference"])
def test_no_query_at_all(backend):
    """The sdpa backend crashed where there were pivots and keys."""
    q, cache = torch.ones(1, 1, 0, 8, requires_grad=True), torch.ones(1, 1, 2, 8)
    layout = ThreeRegionLayout(torch.zeros(1, 0, dtype=torch.int64), 1, 1)
    assert (
        decode_attention(q, cache, cache, torch.tensor([1]), layout=layout, backend=backend).shape == q.shape
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ALL)
def test_equals_the_last_rows_of_training_attention(backend, case, backend_device):
    device = backend_device(backend)
    dtype = torch.float32 if backend in KERNELS else torch.float64
    last, k_cache, v_cache, lengths, layout, (q, k, v) = make(case, dtype, device)
    T, Tq = q.shape[2], last.shape[2]
    clipped = layout.pivots.masked_fill(layout.pivots >= T, -1)
    training_layout = ThreeRegionLayout(clipped, 4, 2, 0.6)
    full, _ = brute_force_attention(q, k, v, training_layout, 8**-0.5)
    torch.testing.assert_close(full, three_region_attention(q, k, v, training_layout, backend="reference"))
    out = decode_attention(last, k_cache, v_cache, lengths, layout=on_device(layout, device), backend=backend)
    dense = decode_attention(last, k_cache, v_cache, lengths.int(), backend=backend)
    causal = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(out[b].cpu(), full[b, :, n - Tq : n])
        torch.testing.assert_close(dense[b].cpu(), causal[b, :, n - Tq : n])


@pytest.mark.budget
@pytest.mark.parametrize("with_layout", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_budget(backend, case, dtype, with_layout, backend_device):
    device = backend_device(backend)
    q, k_cache, v_cache, lengths, layout, _ = make(case, dtype, device)
    layout = on_device(layout, device) if with_layout else None
    out = decode_attention(q, k_cache, v_cache, lengths, layout=layout, scale=0.5, backend=backend)
    reference = lambda *tensors: [decode_attention_reference(*tensors, lengths, layout, 0.5)]  # noqa: E731
    (truth,), (eager,) = judge(reference, [q, k_cache, v_cache])
    assert_within_budget(out, eager, truth, dtype=dtype)


@pytest.mark.parametrize("with_layout", [False, True])
@pytest.mark.parametrize("S", [20, 90])
@pytest.mark.parametrize("backend", ALL)
def test_a_query_before_the_start_gives_zeros(backend, S, with_layout, backend_device):
    device = backend_device(backend)
    cache = torch.full((2, 1, S, 8), torch.nan, device=device)
    cache[0, :, :2] = torch.randn(1, 2, 8, device=device)
    layout = ThreeRegionLayout(torch.tensor([[0], [1]], device=device), 4, 2) if with_layout else None
    lengths = torch.tensor([2, 0], device=device)
    q = torch.randn(2, 1, 3, 8, device=device)
    out = decode_attention(q, cache, cache, lengths, layout=layout, backend=backend)
    assert bool((out[1] == 0).all()) and bool((out[0, :, 0] == 0).all())
    torch.testing.assert_close(out[0, :, 1], cache[0, :, 0])
    # Alone, the sample is as long as the longest.
    layout = ThreeRegionLayout(torch.tensor([[0]], device=device), 4, 2) if with_layout else None
    alone = decode_attention(q[:1], cache[:1], cache[:1], lengths[:1], layout=layout, backend=backend)
    torch.testing.assert_close(alone, out[:1])


@pytest.mark.parametrize("backend", ALL)
def test_an_empty_sample_beside_a_long_one(backend, backend_device):
    q, cache = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1100, 8)
    moved = [x.to(backend_device(backend)) for x in (q, cache, cache, torch.tensor([0, 1100]))]
    out = decode_attention(*moved, backend=backend).cpu()
    assert bool((out[0] == 0).all())
    torch.testing.assert_close(out[1:], scaled_dot_product_attention(q[1:], cache[1:], cache[1:]))


@pytest.mark.parametrize("backend", ALL)
def test_keys_outside_the_layout_are_not_seen(backend, backend_device):
    """Were an excluded key read into the sum, its values of 10^6 would show."""
    device = backend_device(backend)
    q, k_cache, v_cache, lengths, layout, _ = make("one_query", torch.float32, device)
    seen = layout.dense_mask(31)[0, 30].to(device)
    v_cache[:, :, :31][:, :, ~seen] = 1e6
    out = decode_attention(q, k_cache, v_cache, lengths, layout=on_device(layout, device), backend=backend)
    assert float(out.abs().max()) < 100


@pytest.mark.parametrize("with_layout", [False, True])
@pytest.mark.parametrize("backend", ALL)
def test_compile_without_graph_break(backend, with_layout, backend_device):
    device = backend_device(backend)
    q, k_cache, v_cache, lengths, layout, _ = make("several_lengths", torch.float32, device)
    layout = on_device(layout, device) if with_layout else None
    torch.compiler.reset()  # one function, and more backends than Dynamo compiles it for
    function = lambda q, n: decode_attention(q, k_cache, v_cache, n, layout=layout, backend=backend)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, lengths), function(q, lengths))


# B, H, Hkv, Tq, S, D, P, w, W: past the edges of what the cpu backend takes at once, in keys (64, 512), in
# queries that share them (2, 4) and in elements of a head (4, 8, 16 and four times those).
LARGE = {
    "one_query": (2, 2, 2, 1, 1300, 64, 0, 0, 0),
    "at_an_edge": (2, 4, 4, 1, 1024, 64, 0, 0, 0),
    "past_an_edge": (2, 4, 4, 1, 513, 64, 0, 0, 0),
    "odd_head": (2, 4, 2, 3, 600, 20, 0, 0, 0),
    "wide_head": (2, 8, 4, 1, 300, 256, 0, 0, 0),
    "head_of_80": (2, 4, 4, 1, 130, 80, 0, 0, 0),
    "regions": (2, 2, 2, 1, 1500, 64, 700, 32, 3),
    "regions_many_queries": (2, 4, 2, 9, 1500, 64, 600, 32, 3),
    "queries_over_blocks": (1, 2, 2, 130, 700, 32, 300, 16, 2),
}


def make_large(case, dtype, device):
    """The caches are part of a larger projection, and rubbish from each sequence's end on."""
    B, H, Hkv, Tq, S, D, P, w, W = LARGE[case]
    lengths = torch.tensor([S, S - 37][:B])
    caches = torch.randn(B, S, 2, Hkv, D)
    for b, n in enumerate(lengths.tolist()):
        caches[b, n:] = torch.nan
    k_cache, v_cache = caches.to(dtype).to(device).permute(2, 0, 3, 1, 4)
    q = torch.randn(B, H, Tq, D).to(dtype).to(device)
    layout = None
    if P:
        pivots = torch.stack([torch.randperm(S - 37)[:P] for _ in range(B)]).int()
        pivots[:, ::7] = -1
        layout = ThreeRegionLayout(pivots.to(device), w, W, 0.7)
    return q, k_cache, v_cache, lengths.to(device), layout


@pytest.mark.budget
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("backend", ["cpu"])  # test_decode_attention_triton.py has edges of its own
def test_edges(backend, case, dtype, backend_device):
    *tensors, lengths, layout = make_large(case, dtype, backend_device(backend))
    out = decode_attention(*tensors, lengths, layout=layout, scale=0.3, backend=backend)
    reference = lambda *tensors: [decode_attention_reference(*tensors, lengths, layout, 0.3)]  # noqa: E731
    (truth,), (eager,) = judge(reference, tensors)
    assert_within_budget(out, eager, truth, dtype=dtype)


@pytest.mark.parametrize("case", ["one_query", "regions_many_queries"])
def test_neither_the_batch_nor_another_run_changes_a_bit(case, backend_device):
    q, k, v, lengths, layout = make_large(case, torch.bfloat16, backend_device("cpu"))
    q, k, v, lengths = (torch.cat([x, x]) for x in (q, k, v, lengths))
    lengths[2:] -= 900

    def run(rows):
        chosen = layout and ThreeRegionLayout(torch.cat([layout.pivots] * 2)[rows], 32, 3, 0.7)
        return decode_attention(q[rows], k[rows], v[rows], lengths[rows], layout=chosen, backend="cpu")

    together = run(slice(0, 4))
    assert torch.equal(together, run(slice(0, 4)))
    for i in range(4):
        assert torch.equal(together[i : i + 1], run(slice(i, i + 1)))


@pytest.mark.budget
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, instruction_set, backend_device):
    instruction_set(isa)
    for dtype in DTYPES:
        for case in ("one_query", "odd_head", "wide_head", "regions_many_queries"):
            test_edges("cpu", case, dtype, backend_device)


def test_the_thread_count_changes_no_bit(backend_device):
    backend_device("cpu")
    q, k, v, lengths, layout = make_large("regions_many_queries", torch.float32, "cpu")
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(decode_attention(q, k, v, lengths, layout=layout, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("Tq", [1, 3])
@pytest.mark.parametrize("backend", ALL)
def test_nan_stays_in_its_row(backend, Tq, backend_device):
    q, k_cache, v_cache = torch.randn(1, 2, Tq, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    lengths = torch.tensor([40])
    expected = decode_attention(q, k_cache, v_cache, lengths, backend="reference")
    q[0, 1, 0, 3] = torch.nan
    moved = (x.to(backend_device(backend)) for x in (q, k_cache, v_cache, lengths))
    out = decode_attention(*moved, backend=backend).cpu()
    assert bool(out[0, 1, 0].isnan().all())
    out[0, 1, 0] = expected[0, 1, 0]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_logits_past_float16(backend, backend_device):
    q, k_cache, v_cache = (torch.randn(1, 2, n, 64, dtype=torch.float64).half() for n in (1, 70, 70))
    q, k_cache = q * 9000, k_cache * 9000
    moved = [x.to(backend_device(backend)) for x in (q, k_cache, v_cache, torch.tensor([70]))]
    out = decode_attention(*moved, scale=1.0, backend=backend).cpu()
    best = (q.double() @ k_cache.double().transpose(-1, -2)).argmax(-1)
    torch.testing.assert_close(out, v_cache.gather(2, best[..., None].expand(-1, -1, -1, 64)))


def test_where_a_kernel_cannot_the_default_is_sdpa(monkeypatch, backend_device):
    """float64, a wide head, a gradient: taken by default, refused when the kernel is asked for."""
    device, seen = backend_device("cpu"), []
    monkeypatch.setattr(api.decode_attention_op, "_ready", {})
    for place, name in ((api.decode_attention_op, "_unsaved"), (api.sdpa, "forward")):
        function = getattr(place, name)
        route = "sdpa" if place is api.sdpa else "op"
        monkeypatch.setattr(place, name, lambda *a, f=function, r=route: seen.append(r) or f(*a))
    cases = [
        (torch.float32, 8, False, ""),
        (torch.float64, 8, False, "float32, float16 or bfloat16, got torch.float64"),
        (torch.float32, 264, False, "head sizes up to 256, got 264"),
        (torch.float32, 8, True, "has no gradient"),
    ]
    for dtype, D, gradient, message in cases:
        x = torch.randn(1, 1, 4, D, dtype=dtype, device=device)
        arguments = x[:, :, :1].requires_grad_(gradient), x.detach(), x.detach(), torch.tensor([4])
        out = decode_attention(*arguments)
        assert seen.pop() == ("sdpa" if message else "op")
        assert out.requires_grad == gradient
        if message:
            with pytest.raises(NotImplementedError, match=f"the cpu backend .*{message}.*backend='sdpa'"):
                decode_attention(*arguments, backend="cpu")


@pytest.mark.skipif(_extension.native is None, reason=_extension.missing_reason)
@pytest.mark.parametrize("with_layout", [False, True])
@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("order", ["heads first", "positions first"])
def test_a_second_call_goes_straight_to_the_kernel(order, with_starts, with_layout, monkeypatch):
    monkeypatch.setattr(api.decode_attention_op, "_ready", {})
    shape = (2, 2, 9, 8) if order == "heads first" else (2, 9, 2, 8)

    def inputs():
        q, k, v = (torch.randn(shape) for _ in range(3))
        if order != "heads first":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        pivots = torch.stack([torch.randperm(9)[:3] for _ in range(2)])
        layout = ThreeRegionLayout(pivots, block_size=2, window_blocks=1) if with_layout else None
        starts = torch.randint(0, 3, (2,)) if with_starts else None
        return (q[:, :, :2], k, v, torch.randint(3, 10, (2,))), {"layout": layout, "starts": starts}

    given, options = inputs()
    decode_attention(*given, **options)
    monkeypatch.setattr(api.decode_attention_op, "for_signature", None)
    given, options = inputs()
    out = decode_attention(*given, **options)
    assert out.is_contiguous()
    torch.testing.assert_close(out, decode_attention(*given, **options, backend="reference"))
    for lengths in ([0, 10], [-1, 4]):
        with pytest.raises(ValueError, match=r"lengths must lie in \[0, 9\] \(the cache's size\), got"):
            decode_attention(*given[:3], torch.tensor(lengths), **options)
    if with_layout:
        options["layout"].pivots[1, 2] = 9
        with pytest.raises(ValueError, match=r"in \[0, 9\), the cache's size \(-1 pads\), got 9"):
            decode_attention(*given, **options)
    assert torch.isfinite(
        decode_attention(*(x.requires_grad_() for x in given[:3]), given[3], starts=options["starts"])
    ).all()


@pytest.mark.skipif(_extension.native is None, reason=_extension.missing_reason)
@pytest.mark.parametrize(("length", "pivot"), [(10, 0), (-1, 0), (9, 9)])
def test_the_kernel_itself_looks_at_positions(length, pivot):
    """Nobody has checked them where the op is called by its name, as compiled code does."""
    q, cache = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 9, 8)
    layout = torch.tensor([[pivot]]), 2, 1, 0.0, 9
    with pytest.raises(
        ValueError, match=r"decode_attention: (lengths|layout.pivots) must lie .*the cache.s size"
    ):
        torch.ops.cogview_kernels.decode_attention(
            q, cache, cache, torch.tensor([length]), *layout, None, 1.0, "cpu"
        )


def test_an_empty_cache_gives_zeros():
    cache = torch.empty(2, 1, 0, 8)
    out = decode_attention(torch.randn(2, 1, 1, 8), cache, cache, torch.tensor([0, 0]))
    assert bool((out == 0).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 2, 4)}, ValueError, r"q must have shape \[B, H, Tq, D\], got \(2, 2, 4\)"),
        ({"q": torch.ones(2, 2, 1, 4).half()}, TypeError, "k_cache must have the dtype of q, torch.float16"),
        ({"k_cache": torch.ones(1, 2, 9, 4)}, ValueError, r"k_cache must have shape \[2, Hkv, S, 4\]"),
        (
            {"v_cache": torch.ones(2, 2, 8, 4)},
            ValueError,
            r"shape of k_cache, \(2, 2, 9, 4\), got \(2, 2, 8, 4\)",
        ),
        ({"q": torch.ones(2, 3, 1, 4)}, ValueError, "q's heads must be a multiple of k_cache's, got 3 and 2"),
        ({"lengths": [1, 2]}, TypeError, "lengths must be an int32 or int64 tensor, got list"),
        ({"lengths": torch.ones(2)}, TypeError, "got torch.float32"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths must have shape \[2\], got \(1,\)"),
        ({"lengths": torch.tensor([1, 10])}, ValueError, r"lengths must lie in \[0, 9\]"),
        ({"layout": [[1]]}, ValueError, r"layout.pivots must have shape \[2, P\] to go with q, got \(1, 1\)"),
        ({"layout": [[1], [9]]}, ValueError, r"must lie in \[0, 9\), the cache's size \(-1 pads\), got 9"),
        ({"layout": [[1], [-2]]}, ValueError, r"must lie in \[0, 9\), the cache's size \(-1 pads\), got -2"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
        ({"backend": "chunked"}, NotImplementedError, "no chunked backend; this op has cpu"),
    ],
    ids=lambda value: None,
)
def test_errors(change, error, message):
    cache = torch.ones(2, 2, 9, 4)
    arguments = {"q": torch.ones(2, 2, 1, 4), "k_cache": cache, "v_cache": cache}
    arguments |= {"lengths": torch.tensor([1, 2])} | change
    if "layout" in change:
        arguments["layout"] = ThreeRegionLayout(torch.tensor(change["layout"]), 2, 2)
    with pytest.raises(error, match=message):
        decode_attention(**arguments)


# ---- derivatives: right, or an error


def _squares(backend, with_layout):
    k, v = torch.randn(2, 1, 1, 20, 8)
    layout = ThreeRegionLayout(torch.tensor([[1, 3, 7]]), 4, 2, 0.5) if with_layout else None
    return lambda q, name=backend: (
        decode_attention(q, k, v, torch.tensor([20]), layout=layout, backend=name).pow(2).sum()
    )


@pytest.mark.parametrize("with_layout", [False, True])
@pytest.mark.parametrize("transform", attention.TRANSFORMS)
def test_transforms_are_right(transform, with_layout):
    """By default, where a gradient is needed, through SDPA."""
    f, q = _squares(None, with_layout), torch.randn(1, 2, 2, 8)
    call = attention.TRANSFORMS[transform]
    expected = call(lambda x: f(x, "reference"), q.clone())
    torch.testing.assert_close(call(f, q.clone()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transform", [t for t in attention.REFUSED if t != "vectorized"])  # SDPA has it
@pytest.mark.parametrize("backend", [None, *KERNELS])
def test_derivatives_that_are_lacking_are_refused(transform, backend, backend_device):
    """``torch.func.jvp`` gave 0. PyTorch itself refuses what its SDPA lacks."""
    backend_device(backend or "cpu")
    f, q = _squares(backend, True), torch.randn(1, 2, 2, 8)
    call, _ = attention.REFUSED[transform]
    with pytest.raises((NotImplementedError, RuntimeError), match=r"decode_attention: |_scaled_dot_product"):
        call(f, q)
    call(lambda x: f(x, "reference"), q)
