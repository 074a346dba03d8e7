# SPDX-License-Identifier: Apache-2.0
"""The Triton backend of three_region_attention: its branches, its configurations, what it compiles to."""

from __future__ import annotations

import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks import shapes
from cogview_kernels import ThreeRegionLayout, three_region_attention
from cogview_kernels.three_region_attention import launch_config, tune
from cogview_kernels.three_region_attention.launch_config import DEFAULTS, KERNELS, Config
from tests.helpers.triton_compile import Call, assert_clean, benchmark_calls, compile_calls, meta

# ---- the pivots' index and the branches of the launcher


def index_of(pivots, T, w, W, starts=None):
    """Sorted pivots, ranks of positions, and how many pivots lie before each block and before the end."""
    from cogview_kernels.three_region_attention import triton_kernels

    q = torch.empty(len(pivots), 1, T, 32, device=pivots.device)
    sizes = triton_kernels._Sizes(q, q, ThreeRegionLayout(pivots, w, W))
    residuals = torch.empty(sizes.peaks_at, dtype=torch.int32, device=pivots.device)
    origins = residuals if starts is None else starts
    triton_kernels._index_launch(sizes, starts is not None)(pivots, origins, residuals)
    widths = (sizes.PP, T, sizes.blocks + 1)
    return residuals.view(len(pivots), -1)[:, : sum(widths)].split(widths, 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
@pytest.mark.parametrize(("T", "w", "W", "P"), [(300, 16, 2, 130), (300, 7, 3, 5), (70, 64, 1, 64)])
def test_index(T, w, W, P, dtype, backend_device):
    device = backend_device("triton")
    pivots = torch.stack([torch.randperm(T)[:P] for _ in range(3)])
    pivots[1, ::3] = -1
    # Pivots before a sample's start are none, and its blocks are counted from there.
    starts = torch.tensor([0, 11, T]) if dtype == torch.int32 else torch.zeros(3, dtype=torch.int64)
    given = starts.to(device) if dtype == torch.int32 else None
    sorted_pivots, rank_of_pivot, counts = index_of(pivots.to(device, dtype), T, w, W, given)
    expected = pivots.masked_fill(pivots < starts[:, None], T).sort(1).values
    assert torch.equal(sorted_pivots.cpu().long(), torch.nn.functional.pad(expected, (0, -P % 128), value=T))
    edges = (starts[:, None] + torch.arange(-(-T // w) + 1) * w).clamp(max=T)
    assert torch.equal(counts.cpu().long(), torch.searchsorted(expected, edges))
    for sample in range(3):
        rank = {p: r for r, p in enumerate(expected[sample].tolist()) if p < T}
        assert rank_of_pivot[sample].tolist() == [rank.get(j, -1) for j in range(T)]


def test_index_of_wrong_pivots(backend_device):
    """Values that a GPU is not asked to check stay inside the tensors."""
    device = backend_device("triton")
    pivots = torch.tensor([[5, 5, 99, -7, 5, 2]], device=device)
    sorted_pivots, _, _ = index_of(pivots, 10, 2, 1)
    assert sorted_pivots.tolist() == [[2, 5] + 126 * [10]]


@pytest.mark.parametrize(
    ("T", "W", "P", "launched"),
    [
        (40, 2, 6, ["_index", "fwd", "dq", "dkv_far", "dkv"]),
        (40, 2, 0, ["fwd", "dq", "dkv"]),  # no pivots
        (40, 5, 6, ["fwd", "dq", "dkv"]),  # a window over everything
    ],
)
def test_launches(T, W, P, launched, backend_device, monkeypatch):
    device = backend_device("triton")
    from cogview_kernels.three_region_attention import triton_kernels

    calls = []

    def choose(kernel, *_):
        calls.append(kernel)
        return Config(16, 16, 4, 1)

    index = triton_kernels._index_launch
    monkeypatch.setattr(launch_config, "choose", choose)
    monkeypatch.setattr(triton_kernels, "_index_launch", lambda *a: calls.append("_index") or index(*a))
    q = torch.randn(1, 1, T, 32, device=device, requires_grad=True)
    layout = ThreeRegionLayout(torch.randperm(T, device=device)[None, :P], 8, W)
    three_region_attention(q, q, q, layout, backend="triton").sum().backward()
    assert calls == launched


@pytest.mark.parametrize(("T", "D"), [(8, 288)])
def test_limits(T, D, backend_device):
    q = torch.ones(1, 1, T, D, device=backend_device("triton"))
    layout = ThreeRegionLayout(torch.tensor([[1]], device=q.device), 2, 2)
    with pytest.raises(NotImplementedError, match="the triton backend takes head sizes up to 256, got 288"):
        three_region_attention(q, q, q, layout, backend="triton")


# ---- configurations


def test_every_chip_and_head_size_has_defaults():
    for arch in (80, 86, 90):
        for bits in (16, 32):
            for D in (32, 64, 80, 96, 128, 256):
                for dropout in (False, True):
                    for kernel in KERNELS:
                        for block_size in (7, 64, 128, 100, 192):
                            config = launch_config.shipped(kernel, arch, D, bits, block_size, dropout)
                            tile = config.block_n if kernel == "dkv" else config.block_m
                            assert kernel == "dkv_far" or tile <= 64 or block_size % tile == 0
                            assert config in launch_config.candidates(
                                kernel, arch, D, bits, block_size, dropout
                            )


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """Tuning as on an H100, its results in a folder of the test; what is timed is appended to the list."""
    monkeypatch.setenv("COGVIEW_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(launch_config, "AUTOTUNE", True)
    monkeypatch.setattr(launch_config, "_memory", {})
    monkeypatch.setattr(launch_config, "_compiler", lambda: "3.7")
    monkeypatch.setattr(launch_config, "architecture", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    timed = []

    def time(launch, config):
        timed.append(config)
        launch(config)
        return abs(config.block_n - 32) + config.stages

    monkeypatch.setattr(launch_config, "milliseconds", time)
    return timed


def test_tuning_is_kept_on_disk(tuning, monkeypatch):
    """The kernel is launched to be timed once; a later process reads the file."""
    device, timed, launched = torch.device("cuda"), tuning, []
    arguments = ("fwd", device, 64, torch.float16, 128, False, launched.append)
    best = launch_config.choose(*arguments)
    assert (best.block_n, best.stages) == (32, 2) and launched == timed and len(timed) > 3
    assert launch_config.choose(*arguments) == best and launched == timed
    assert launch_config.choose("fwd", device, 64, torch.float16, 64, False, launched.append).block_m == 64
    kept = json.loads(launch_config.cache_file().read_text())
    assert kept["a GPU, triton 3.7/fwd/D64/16/w128/dropout0"]["block_n"] == 32

    count = len(timed)
    monkeypatch.setattr(launch_config, "_memory", {})
    assert launch_config.choose(*arguments) == best and len(timed) == count
    launch_config.cache_file().write_text("{")
    monkeypatch.setattr(launch_config, "_memory", {})
    assert launch_config.choose(*arguments) == best and len(timed) > count


def test_another_triton_is_tuned_anew(tuning, monkeypatch):
    arguments = ("fwd", torch.device("cuda"), 64, torch.float16, 128, False, lambda config: None)
    launch_config.choose(*arguments)
    count = len(tuning)
    monkeypatch.setattr(launch_config, "_memory", {})
    monkeypatch.setattr(launch_config, "_compiler", lambda: "3.8")
    launch_config.choose(*arguments)
    assert len(tuning) == 2 * count


@pytest.mark.parametrize("home", ["a file", "nobody knows where"])
def test_a_result_that_cannot_be_kept_is_a_warning(tuning, tmp_path, monkeypatch, home):
    """As where the home can only be read, which a test that may run as root cannot arrange."""

    def cache_file():
        if home == "a file":
            return tmp_path / "file" / "folder" / "tuned.json"
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(launch_config, "cache_file", cache_file)
    arguments = ("fwd", torch.device("cuda"), 64, torch.float16, 128, False, lambda config: None)
    with pytest.warns(UserWarning, match="what tuning found is not kept for later processes"):
        best = launch_config.choose(*arguments)
    count = len(tuning)
    assert launch_config.choose(*arguments) == best and len(tuning) == count


def test_threads_that_tune_do_not_write_to_one_file(tuning, monkeypatch):
    """Each has written its part before any of them renames one."""
    together, real = threading.Barrier(4), Path.replace

    def replace(path, target):
        together.wait(10)
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as threads:
        warnings.simplefilter("error")
        list(threads.map(lambda key: launch_config._write(str(key), Config(64, 64, 4, 2)), range(4)))
    (kept,) = launch_config.cache_file().parent.iterdir()
    assert len(json.loads(kept.read_text())) >= 1


@pytest.fixture
def tiny_problem(backend_device, monkeypatch, tmp_path):
    backend_device("triton")
    for name, value in {"H": 1, "T": 150, "P": 40, "BLOCK_SIZE": 16, "WINDOW_BLOCKS": 2}.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setenv("COGVIEW_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(launch_config, "_memory", {})
    monkeypatch.setattr(launch_config, "_compiler", lambda: "3.7")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(
        tune, "configurations", lambda kernel, *_: [Config(32, 32, 4, 1), Config(16, 16, 4, 1)]
    )
    return tune.Problem(32, torch.float32, 0.1, B=1)


def test_tune_goes_through_every_kernel(device, tiny_problem, monkeypatch):
    def time(launch, config):
        launch(config)
        return float(config.block_m)

    monkeypatch.setattr(launch_config, "milliseconds", time)
    choose = launch_config.choose
    times = tune.tune(tiny_problem, device)
    assert times == {k: [(16.0, Config(16, 16, 4, 1)), (32.0, Config(32, 32, 4, 1))] for k in KERNELS}
    assert launch_config.choose is choose
    expected = {f"a GPU, triton 3.7/{kernel}/D32/32/w1/dropout1" for kernel in KERNELS}
    assert launch_config._read().keys() == expected


def test_tune_saves_the_row_to_ship(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(launch_config, "architecture", lambda device: 90)
    times = {kernel: [(1.0, Config(64, 32, 4, 3)), (2.0, Config(64, 64, 4, 3, 168))] for kernel in KERNELS}
    monkeypatch.setattr(tune, "tune", lambda problem, device, processes: times)
    tune.main(["64", "--dtypes", "bfloat16", "--dropout", "0", "--save", str(tmp_path / "tuned.txt")])
    saved = (tmp_path / "tuned.txt").read_text().splitlines()
    assert saved[0].startswith("a GPU") and "  fwd of 2: 64/32/4/3 1.000 ms, 64/64/4/3/168 2.000 ms" in saved
    assert saved[-1] == '(90, 16): (64, False): _row("64/32/4/3 64/32/4/3 64/32/4/3 64/32/4/3")'


def test_tune_compiles_what_is_asked_for(device, tiny_problem):
    wanted = [("fwd", Config(16, 16, 4, 1)), ("dkv", Config(32, 16, 4, 1)), ("dkv", Config(16, 32, 4, 1))]
    assert tune.compile_some(tiny_problem, wanted, device) == 3


@pytest.mark.parametrize("arch", [80, 86, 90])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("D", [32, 64, 80, 128, 256])
def test_every_kernel_has_configurations_to_tune(arch, bits, D):
    assert all(tune.configurations(kernel, arch, D, bits) for kernel in KERNELS)


def test_a_first_call_does_not_tune():
    config = launch_config.choose("fwd", torch.device("cpu"), 64, torch.bfloat16, 128, False, pytest.fail)
    assert config == DEFAULTS[90, 16][64, False][0]


# ---- compiled for chips that are not here

_DROPOUT = {"dropout_p": 0.1, "seed": 2**40}
# Bytes that a kernel may spill. On an H100 these two are the fastest of 80 tile choices each although they
# spill a few registers: dkv takes 0.60 ms on the benchmark's first shape, and 0.80 at best without spills.
_SPILLS = {
    ("dkv_kernel", 90, Config(32, 64, 4, 3, 168)): 200,
    ("dkv_far_kernel", 90, Config(64, 64, 4, 3)): 200,
}


def call(arch, D, dtype, regions, tf32=False, causal=True, has_starts=False, **options):
    """Both directions, at the size of the benchmark's first shape."""
    s = shapes.ATTENTION.gpu[0]
    q, k, v = (meta(s.B, s.H, s.T, D, dtype=dtype, grad=True) for _ in range(3))
    pivots = meta(s.B, regions.P, dtype=torch.int64)
    sizes = regions.block_size, regions.window_blocks
    layout = ThreeRegionLayout(pivots, *sizes, pivot_bias=1.5, causal=causal)
    if has_starts:
        options["starts"] = meta(s.B, dtype=torch.int64)
    return Call("three_region_attention", (q, k, v, layout), options, arch, tf32)


def spills_allowed(report):
    c = report.constants
    if report.name not in ("dkv_kernel", "dkv_far_kernel") or c["D"] != 64 or c["HAS_DROPOUT"]:
        return 0
    config = Config(
        c["BLOCK_M"], c["BLOCK_N"], report.options["num_warps"], c["STAGES"], report.options["maxnreg"]
    )
    return _SPILLS.get((report.name, report.arch, config), 0)


def assert_compiles(calls):
    """No spills, shared memory within the chip, products that overlap, the matrix unit of the chip in use."""
    reports = compile_calls(calls)
    assert_clean(reports, spills_allowed)
    for report in reports:
        if "PRECISION" not in report.constants:  # no product
            continue
        if report.types["q_ptr"] != "*fp32":
            assert report.matrix_instructions == (["wgmma"] if report.arch == 90 else ["mma"]), report
        assert report.constants["PRECISION"] == "ieee" or report.matrix_instructions, report
    return reports


@pytest.mark.parametrize(
    ("arch", "dtypes", "dropout"),
    # Under dropout float16 is compiled with the other head sizes.
    [(80, (), {}), (90, (), {}), (90, (torch.bfloat16, torch.float32), _DROPOUT)],
    ids=["80", "90", "90-dropout"],
)
def test_compiles_the_benchmarks(arch, dtypes, dropout):
    reports = assert_compiles(benchmark_calls("three_region_attention", arch, dtypes, **dropout))
    assert {r.name for r in reports} == {"index_kernel", "bwd_rows_kernel"} | {
        f"{kernel}_kernel" for kernel in KERNELS
    }
    for report in reports:
        if report.types.get("q_ptr") in ("*bf16", "*fp16"):
            # K and V arrive by asynchronous copies of 16 bytes, gathered ones too.
            assert report.ptx.count("cp.async.cg.shared.global") >= 4, report


@pytest.mark.parametrize(("D", "arch"), [(32, 80), (64, 80), (64, 90), (128, 90), (256, 90)])
def test_compiles_for_sm80_and_sm90(D, arch):
    """The other head sizes, and of each what no benchmark has: small blocks in float16, and tf32.

    Under dropout large blocks are in float16 as well: what small ones do not change is compiled once."""
    calls = [
        call(arch, D, torch.float16, shapes.RELEASED, **_DROPOUT),
        call(arch, D, torch.float32, shapes.PAPER, tf32=True),
    ]
    if D != shapes.HEAD:
        calls += [
            call(arch, D, torch.bfloat16, shapes.PAPER),
            call(arch, D, torch.float16, shapes.PAPER, **_DROPOUT),
            call(arch, D, torch.float32, shapes.PAPER),
        ]
    assert_compiles(calls)


def test_compiles_both_sides_and_starts():
    """Of one architecture and head size: which tiles are masked changes, not how tiles are multiplied."""
    assert_compiles(
        [
            call(90, 64, torch.bfloat16, shapes.PAPER, causal=False),
            call(90, 64, torch.float16, shapes.PAPER, has_starts=True),
        ]
    )
