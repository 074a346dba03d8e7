# SPDX-License-Identifier: Apache-2.0
"""The Triton backend of decode_attention: its tiles, splits and dispatch, what it compiles to."""

from __future__ import annotations

import importlib
import re

import pytest
import torch

from cogview_kernels import ThreeRegionLayout, _backends, _counters, decode_attention
from cogview_kernels._triton import Plans
from cogview_kernels.decode_attention.reference import decode_attention_reference
from tests.conftest import HAS_GPU
from tests.helpers.fused import fuse_products
from tests.helpers.tolerance import assert_within_budget, judge
from tests.helpers.triton_compile import (
    SHARED_MEMORY_LIMIT,
    Call,
    assert_clean,
    benchmark_calls,
    compile_calls,
    meta,
)

MODULE = "cogview_kernels.decode_attention.triton_kernels"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# H, Hkv, Tq: a row alone; a tile of several; two tiles of 32 and a remainder. The row alone has more heads:
# where results are few, the errors of kernel and eager PyTorch differ by chance.
ROWS = {
    "one": (4, 4, 1),
    "group": (4, 2, 1),
    "several": (4, 2, 3),
    "tiles": (4, 2, 35),
    "one_head": (1, 1, 70),
}


@pytest.fixture
def kernels(backend_device):
    backend_device("triton")
    return importlib.import_module(MODULE)


def force_splits(kernels, monkeypatch, splits):
    monkeypatch.setattr(kernels, "split_count", lambda *_: splits)
    monkeypatch.setattr(kernels, "_plans", Plans(kernels._plan))  # on a GPU, older plans are kept


def make(lengths, S, rows="one", D=16, dtype=torch.float32, device="cpu"):
    """Rubbish lies past each length."""
    H, Hkv, Tq = ROWS[rows]
    B = len(lengths)
    q, k, v = (torch.randn(B, h, n, D).to(dtype) for h, n in ((H, Tq), (Hkv, S), (Hkv, S)))
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = torch.nan, torch.inf
    return *(x.to(device) for x in (q, k, v)), torch.tensor(lengths, device=device)


def make_layout(B, S, P, w=8, W=2, bias=0.9, dtype=torch.int64, device="cpu"):
    pivots = torch.stack([torch.randperm(S)[:P] for _ in range(B)])
    pivots[:, 1::7] = -1
    return ThreeRegionLayout(pivots.to(device, dtype), w, W, bias)


def check(q, k, v, lengths, layout=None, scale=0.25):
    out = decode_attention(q, k, v, lengths, layout=layout, scale=scale, backend="triton")
    reference = lambda *tensors: [decode_attention_reference(*tensors, lengths, layout, scale)]  # noqa: E731
    (truth,), (eager,) = judge(reference, [q, k, v])
    assert_within_budget(out, eager, truth, dtype=q.dtype)


# ---- tiles and splits

# D = 16 has tiles of 64 keys for a row, of 32 for several; splits come in steps of 16. A sample each.
EDGES = [1, 17, 32, 33, 129, 290]


@pytest.mark.budget
@pytest.mark.parametrize("with_layout", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 9])
@pytest.mark.parametrize("rows", ROWS)
def test_edges_of_tiles_and_splits(rows, splits, with_layout, kernels, device, monkeypatch):
    """One tile, two and a remainder; with 9 splits most of the short samples' have no key."""
    force_splits(kernels, monkeypatch, splits)
    inputs = make(EDGES if rows in ("group", "several") else EDGES[1::4], 290, rows, device=device)
    check(*inputs, make_layout(inputs[0].shape[0], 290, 140, device=device) if with_layout else None)


@pytest.mark.budget
@pytest.mark.parametrize("P", [0, 1, 127, 128, 129, 261])
@pytest.mark.parametrize("rows", ["one", "several"])
def test_edges_of_the_pivots(rows, P, kernels, device, monkeypatch):
    for splits in (1, 4):
        force_splits(kernels, monkeypatch, splits)
        check(*make([300, 140, 17, 3], 300, rows, device=device), make_layout(4, 300, P, 7, 1, device=device))


@pytest.mark.budget
@pytest.mark.parametrize(
    ("w", "W"), [(1, 1), (1, 30), (16, 3), (7, 5), (64, 1), (99, 1), (100, 1), (3, 10**6)]
)
@pytest.mark.parametrize("rows", ["one", "several"])
def test_windows(rows, w, W, kernels, device, monkeypatch):
    """Up to one that leaves no key far, which takes the way without a layout."""
    force_splits(kernels, monkeypatch, 2)
    check(*make([100, 64, 63, 1], 100, rows, device=device), make_layout(4, 100, 40, w, W, device=device))


@pytest.mark.budget
@pytest.mark.parametrize("rows", ["one", "several"])
@pytest.mark.parametrize("D", [1, 8, 33, 40, 64, 80, 128, 200, 256])
def test_head_sizes(D, rows, kernels, device, monkeypatch):
    force_splits(kernels, monkeypatch, 2)
    for dtype in (torch.float32, torch.float16):
        inputs = make([70, 33], 70, rows, D, dtype, device)
        check(*inputs, make_layout(2, 70, 30, device=device), scale=D**-0.5)


@pytest.mark.budget
@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("rows", ["one", "several"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, rows, splits, kernels, device, monkeypatch):
    force_splits(kernels, monkeypatch, splits)
    inputs = make([310, 200], 330, rows, 64, dtype, device)
    check(*inputs, make_layout(2, 330, 100, 16, 3, device=device), scale=0.125)
    check(*inputs, scale=0.125)


@pytest.mark.budget
def test_maxima_that_differ_between_splits(kernels, device, monkeypatch):
    """Logits from -1000 to 1000, far from what float32 can raise to a power."""
    for rows in ("one", "several"):
        q, k, v, lengths = make([256, 130], 256, rows, device=device)
        for splits in (1, 6):
            force_splits(kernels, monkeypatch, splits)
            check(30 * q, 30 * k, v, lengths, scale=1.0)
            check(30 * q, 30 * k, v, lengths, scale=-1.0)
            check(q, k, v, lengths, scale=0.0)


def test_a_query_before_the_start_gives_zeros_with_splits(kernels, device, monkeypatch):
    force_splits(kernels, monkeypatch, 3)
    q, k, v, lengths = make([2, 0], 40, "several", device=device)
    for layout in (None, make_layout(2, 40, 9, device=device)):
        out = decode_attention(q, k, v, lengths, layout=layout, backend="triton")
        assert bool((out[1] == 0).all()) and bool((out[0, :, 0] == 0).all())
        torch.testing.assert_close(out[0, :, 1], v[0, :, 0].repeat_interleave(2, 0))


@pytest.mark.parametrize("scale", [0.125, -0.125])
@pytest.mark.parametrize("with_layout", [False, True])
@pytest.mark.parametrize("rows", ["one", "several"])
def test_largest_float16_with_fused_products(rows, with_layout, scale, kernels, device, monkeypatch):
    """Scores of 1e9, whose rounding is 64: where a peak does not cancel to 0 exactly, 2^64 is no float16."""
    if not HAS_GPU:
        fuse_products(monkeypatch)
    for magnitude in (3000.0, 65504.0):
        q, k, v, lengths = make([256, 130, 256], 256, rows, 64, device=device)
        q, k = q.sign() * magnitude, k / k.nan_to_num().abs().max() * magnitude
        q, k, v = (x.half() for x in (q, k, v))
        layout = make_layout(3, 256, 100, 16, 2, device=device) if with_layout else None
        arguments = q.double(), k.double(), v.double(), lengths, layout, scale
        truth = decode_attention_reference(*arguments)
        for splits in (1, 5):
            force_splits(kernels, monkeypatch, splits)
            out = decode_attention(q, k, v, lengths, layout=layout, scale=scale, backend="triton")
            # Almost always the value of one key: another's score is seldom within the float32 rounding.
            close = torch.isclose(out.double(), truth, atol=1e-2, rtol=1e-2).all(-1)
            assert bool(out.isfinite().all()) and close.double().mean() > 0.9


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-30, -3.0])
@pytest.mark.parametrize("rows", ["one", "several"])
def test_scales(rows, scale, kernels, device, monkeypatch):
    """The bias is told in units of the products: no float32 holds it for the smallest scales."""
    q, k, v, lengths = make([90, 41], 90, rows, device=device)
    for splits in (1, 3):
        force_splits(kernels, monkeypatch, splits)
        check(q, k, v, lengths, make_layout(2, 90, 40, device=device), scale=scale)


# ---- the last program of a row tile merges


def counters_are_zero():
    assert _counters._kept
    return not any(bool(counters.any()) for counters in _counters._kept)


@pytest.mark.parametrize("rows", ROWS)
def test_counters_return_to_zero(rows, kernels, device, monkeypatch):
    """Also where most splits have no key; and calls that follow one another give the same bits."""
    for splits in (2, 7, 3):
        force_splits(kernels, monkeypatch, splits)
        q, k, v, lengths = make([290, 20, 0], 290, rows, device=device)
        first = decode_attention(q, k, v, lengths, backend="triton")
        assert counters_are_zero()
        for _ in range(2):
            assert torch.equal(decode_attention(q, k, v, lengths, backend="triton"), first)
        assert counters_are_zero()


@pytest.mark.parametrize("rows", ["one", "several"])
def test_only_the_last_program_merges(rows, kernels, device, monkeypatch):
    """A counter that some of a head's programs have not reached leaves its rows alone."""
    force_splits(kernels, monkeypatch, 3)
    q, k, v, lengths = make([290, 100], 290, rows, device=device)
    counters = torch.zeros(1024, dtype=torch.int32, device=device)
    counters[1] = -1
    monkeypatch.setattr(_counters, "zeroed", lambda *_: counters)
    out = decode_attention(q, k, v, lengths, backend="triton")
    assert counters[1] == 2 and int(counters.sum()) == 2
    G, Hkv = q.shape[1] // k.shape[1], k.shape[1]
    merged = torch.ones(2, Hkv, dtype=torch.bool)
    merged.view(-1)[1] = False
    finite = out.isfinite().all(-1).all(-1).view(2, Hkv, G).all(-1)
    assert torch.equal(finite.cpu(), merged)


# ---- what tensors may be


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_integers(dtype, kernels, device):
    layout = make_layout(2, 90, 40, dtype=dtype, device=device)
    for rows in ("one", "several"):
        q, k, v, lengths = make([80, 41], 90, rows, device=device)
        check(q, k, v, lengths.int(), layout)


@pytest.mark.parametrize("rows", ["one", "several"])
def test_strided_tensors(rows, kernels, device, monkeypatch):
    """A packed cache, a slice of a projection, columns that are not contiguous, expanded heads."""
    force_splits(kernels, monkeypatch, 2)
    H, Hkv, _ = ROWS[rows]
    q, k, v, lengths = make([90, 50], 90, rows, device=device)
    packed = torch.stack([k, v]).permute(1, 3, 0, 2, 4).contiguous()  # [B, S, 2, Hkv, D]
    strided_k, strided_v = packed.permute(2, 0, 3, 1, 4)
    strided_q = q.permute(0, 2, 1, 3).repeat(1, 1, 3, 1)[:, :, H : 2 * H].transpose(1, 2)
    layout = make_layout(4, 90, 40, device=device)
    layout = ThreeRegionLayout(layout.pivots[::2], 8, 2, 0.9)
    assert not strided_q.is_contiguous() and not layout.pivots.is_contiguous()
    expected = decode_attention(q, k, v, lengths, layout=layout, backend="triton")
    arguments = (strided_q, strided_k, strided_v, lengths.repeat(2, 1).T.flatten()[::2])
    out = decode_attention(*arguments, layout=layout, backend="triton")
    # A compiler that knows strides to be multiples of 16 loads in vectors, and sums in another order.
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    columns = (x.mT.contiguous().mT for x in (q, k, v))
    out = decode_attention(*columns, lengths, layout=layout, backend="triton")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    one = k[:, :1].expand(-1, Hkv, -1, -1)
    check(q, one, v, lengths, layout)


def test_offsets_of_64_bits(kernels, device, monkeypatch):
    """Keys 2^30 elements apart, in memory that is never touched between them."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    q, k, v, lengths = make([3], 3, "group", dtype=torch.bfloat16, device=device)
    far = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device=device)
    far = far.as_strided(k.shape, (0, 2**19, 2**30, 1)).copy_(k)
    for layout in (None, make_layout(1, 3, 3, 1, 1, device=device)):
        near = decode_attention(q, k, v, lengths, layout=layout, backend="triton")
        assert torch.equal(decode_attention(q, far, v, lengths, layout=layout, backend="triton"), near)


def test_empty(kernels, device):
    for B, Tq, S in ((0, 1, 5), (2, 0, 5), (2, 1, 0)):
        cache = torch.ones(B, 1, S, 16, device=device)
        lengths = torch.zeros(B, dtype=torch.int64, device=device)
        out = decode_attention(
            torch.ones(B, 2, Tq, 16, device=device), cache, cache, lengths, backend="triton"
        )
        assert out.shape == (B, 2, Tq, 16) and bool((out == 0).all())


def test_values_that_a_gpu_is_not_asked_to_check_stay_inside_the_tensors(kernels, device):
    q, k, v, _ = make([20, 20], 20, "several", device=device)
    layout = ThreeRegionLayout(torch.tensor([[5, 99, -7], [2**15 - 1, 3, -1]], device=device).short(), 2, 2)
    op = torch.ops.cogview_kernels.decode_attention
    for lengths, clamped in (([-4, 50], [0, 20]), ([2**40, -(2**40)], [20, 0])):
        lengths, clamped = (torch.tensor(x, device=device) for x in (lengths, clamped))
        out, expected = (
            op(q, k, v, n, layout.pivots, 2, 2, 0.5, 1, None, 0.3, "triton") for n in (lengths, clamped)
        )
        assert torch.equal(out, expected) and bool(out.isfinite().all())


# ---- launches and dispatch


@pytest.mark.parametrize(
    ("B", "Hkv", "Tq", "S", "regions", "programs"),
    [
        (1, 40, 1, 130, False, 120),
        (1, 40, 2, 130, False, 120),
        (1, 1, 1, 130, True, 2),  # pivots and window: 60 + 17 keys
        (1, 1, 1, 130, False, 3),
        (133, 2, 1, 130, False, 266),  # enough programs without splits
        (1, 40, 1, 33, False, 40),  # keys of one split
    ],
)
def test_one_launch(B, Hkv, Tq, S, regions, programs, kernels, device, monkeypatch):
    grids = []
    monkeypatch.setattr(kernels.Launch, "__call__", lambda launch, *_: grids.append(launch.grid))
    q, cache = (torch.randn(B, Hkv, n, 64, device=device).bfloat16() for n in (Tq, S))
    layout = make_layout(B, S, 60, device=device) if regions else None
    lengths = torch.full((B,), S, device=device)
    decode_attention(q, cache, cache, lengths, layout=layout, backend="triton")
    assert grids == [(programs,)]


@pytest.mark.parametrize(
    ("programs", "keys", "splits"),
    [
        (40, 1088, 6),  # 240 programs, at most two on a multiprocessor; so in the shapes paper and 16k
        (132, 1088, 2),
        (160, 1088, 3),
        (263, 1088, 2),
        (264, 1088, 1),
        (8, 1088, 17),  # two tiles of 32 keys each, all of them under way at once
        (1, 64, 1),
        (1, 65, 2),
        (1, 10**6, 128),
    ],
)
def test_split_count(programs, keys, splits, kernels):
    assert kernels.split_count(programs, keys, kernels.tiles(1, 64, 16, False)) == splits


def test_default_dispatch(kernels, device, monkeypatch):
    """What a GPU of sm_80 is given: this backend, and SDPA beyond its limits."""
    monkeypatch.setattr(_backends, "_candidates_for", lambda *_: ("triton", "sdpa", "reference"))
    monkeypatch.setattr(_backends, "_passed", {})
    launched = []
    launch = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *a: launched.append(1) or launch(*a))
    for dtype, D, expected in ((torch.float32, 16, 1), (torch.float64, 16, 0), (torch.float32, 264, 0)):
        launched.clear()
        q, k, v, lengths = make([9], 9, D=D, dtype=dtype, device=device)
        out = decode_attention(q, k, v, lengths)
        torch.testing.assert_close(out, decode_attention(q, k, v, lengths, backend="reference"))
        assert len(launched) == expected


@pytest.mark.parametrize(
    ("dtype", "D", "message"),
    [
        (torch.float32, 264, "the triton backend takes head sizes up to 256, got 264; use backend='sdpa'"),
        (torch.float64, 16, "float32, float16 or bfloat16, got torch.float64; use backend='sdpa'"),
    ],
)
def test_limits(dtype, D, message, kernels, device):
    q, k, v, lengths = make([9], 9, D=D, dtype=dtype, device=device)
    with pytest.raises(NotImplementedError, match=message):
        decode_attention(q, k, v, lengths, backend="triton")


@pytest.mark.parametrize("with_layout", [False, True])
def test_opcheck(with_layout, kernels, device):
    q, k, v, lengths = make([40, 7], 50, "several", device=device)
    k, v = k.nan_to_num(0, 0, 0), v.nan_to_num(0, 0, 0)  # it compares the inputs before and after
    pivots = make_layout(2, 50, 9, device=device).pivots if with_layout else None
    arguments = (q, k, v, lengths, pivots, 8, 2, 0.5, 1, None, 0.3, "triton")
    torch.library.opcheck(torch.ops.cogview_kernels.decode_attention, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("with_layout", [False, True])
def test_a_graph_follows_the_lengths(with_layout):
    """Captured once, replayed at other lengths, with other bits nowhere."""
    q, k, v, lengths = make([300, 20], 330, "group", 64, torch.bfloat16, "cuda")
    k, v = k.nan_to_num(0, 0, 0), v.nan_to_num(0, 0, 0)
    layout = make_layout(2, 330, 100, 16, 3, device="cuda") if with_layout else None
    step = lambda: decode_attention(q, k, v, lengths, layout=layout, backend="triton")  # noqa: E731
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for new in ([300, 20], [330, 1], [17, 250]):
        lengths.copy_(torch.tensor(new))
        graph.replay()
        assert torch.equal(out, step())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ["one", "several"])
def test_eager_calls_on_two_streams_beside_two_graphs(rows):
    """A hundred replays each, at lengths that change, all under way at once, each with its own counters."""
    q, k, v, _ = make([1088], 1088, rows, 64, torch.bfloat16, "cuda")
    choices = [torch.tensor([n], device="cuda") for n in (1088, 1087, 700, 65, 64, 17, 3)]
    expected = []
    for lengths in choices:
        check(q, k, v, lengths)
        expected.append(decode_attention(q, k, v, lengths, backend="triton"))
    streams = [torch.cuda.Stream() for _ in range(4)]
    graphs = []
    for stream in streams[2:]:
        lengths, graph = choices[0].clone(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            outs = [decode_attention(q, k, v, lengths, backend="triton") for _ in range(3)]
        graphs.append((graph, lengths, outs))
    torch.cuda.synchronize()
    results = []
    for turn in range(100):
        for at, stream in enumerate(streams):
            which = (turn + at) % len(choices)
            with torch.cuda.stream(stream):
                if at < 2:
                    for _ in range(3):
                        out = decode_attention(q, k, v, choices[which], backend="triton")
                        results.append((which, out))
                else:
                    graph, lengths, outs = graphs[at - 2]
                    lengths.copy_(choices[which])
                    graph.replay()
                    results += [(which, out.clone()) for out in outs]
    torch.cuda.synchronize()
    for which, out in results:
        assert torch.equal(out, expected[which])
    assert counters_are_zero()


@pytest.mark.gpu
def test_a_capture_without_counters_ahead_clears_its_own(monkeypatch):
    q, k, v, lengths = make([1088], 1088, "one", 64, torch.bfloat16, "cuda")
    expected = decode_attention(q, k, v, lengths, backend="triton")
    monkeypatch.setattr(_counters, "_ahead", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, lengths, backend="triton")
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


# ---- compiled for chips that are not here


def call(arch, dtype, D, rows, regions, splits=True, tf32=False):
    """``rows`` queries share the keys of a sample: of one, or of so many that no head is split."""
    B, S = 1 if splits else 300, 4224
    layout = ThreeRegionLayout(meta(B, 768, dtype=torch.int64), 128, 6, 0.5) if regions else None
    q, k, v = (meta(B, heads, n, D, dtype=dtype) for heads, n in ((rows, 1), (1, S), (1, S)))
    lengths = meta(B, dtype=torch.int64)
    return Call("decode_attention", (q, k, v, lengths), {"layout": layout}, arch, tf32)


def assert_merge_is_ordered(ptx, message):
    """All threads' stores, a barrier, one atomic that releases and acquires, a barrier, loads past the L1."""
    before, after = ptx.split("atom.global.gpu.acq_rel.add.u32")
    assert before.rindex("bar.sync") > before.rindex("st.global"), message
    assert after.index("bar.sync") < after.index("ld.global"), message
    loads = re.findall(r"\bld\.global\S*", after)
    assert loads and all(load.startswith("ld.global.cg.") for load in loads), message
    assert "cp.async" not in after, message


def assert_suits_a_row_alone(report):
    """It has little work a program, so that four and more have to run at once on a multiprocessor."""
    assert report.shared <= SHARED_MEMORY_LIMIT[86] // 2, report
    assert report.registers <= 128 or report.types["q_ptr"] == "*fp32", report
    if report.types["q_ptr"] != "*fp32":
        assert not report.matrix_instructions, report


def assert_copies_and_merges(report):
    # All of k and v arrive by asynchronous copies of 16 bytes; only positions are smaller.
    assert report.ptx.count("cp.async.cg.shared.global") >= 8, report
    if report.constants["HAS_SPLITS"]:
        assert_merge_is_ordered(report.ptx, report)


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_the_benchmarks(arch):
    reports = compile_calls(benchmark_calls("decode_attention", arch))
    assert_clean(reports)
    kinds = {(r.constants["HAS_SPLITS"], r.constants["HAS_REGIONS"]) for r in reports}
    assert kinds == {(True, False), (False, False), (True, True)}
    for report in reports:
        assert_suits_a_row_alone(report)
        assert_copies_and_merges(report)


@pytest.mark.parametrize("rows", [1, 16, 32])
@pytest.mark.parametrize(("D", "arch"), [(64, 80), (128, 90)])
def test_compiles_for_sm80_and_sm90(D, arch, rows):
    """Either chip gets the same instructions: one a head size, and the benchmarks are compiled for both."""
    variants = [
        (torch.bfloat16, True),
        (torch.float16, False),
        (torch.float32, True),
        (torch.float32, False),
    ]
    reports = compile_calls(
        call(arch, dtype, D, rows, regions, splits) for dtype, splits in variants for regions in (False, True)
    )
    assert len(reports) == 8
    assert_clean(reports)
    for report in reports:
        # sm_86 has the least shared memory.
        assert report.shared <= SHARED_MEMORY_LIMIT[86], report
        assert_copies_and_merges(report)
        if rows == 1:
            assert_suits_a_row_alone(report)
        elif report.types["q_ptr"] != "*fp32":
            assert report.matrix_instructions == ["mma"], report


def test_other_head_sizes_and_tf32_compile():
    calls = [call(80, torch.float32, D, rows, True) for D in (16, 80, 256) for rows in (1, 16)]
    calls.append(call(90, torch.bfloat16, 256, 32, True))
    calls.append(call(90, torch.float32, 64, 32, True, tf32=True))
    reports = compile_calls(calls)
    assert_clean(reports)
    assert len(reports) == 8 and all(report.shared <= SHARED_MEMORY_LIMIT[86] for report in reports)
    assert reports[-1].constants["PRECISION"] == "tf32" and reports[-1].matrix_instructions == ["mma"]
