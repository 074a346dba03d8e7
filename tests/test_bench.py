# SPDX-License-Identifier: Apache-2.0
"""``python -m cogview_kernels.bench``: every op runs, is compared and printed, and bad arguments are told."""

from __future__ import annotations

import pytest
import torch

from cogview_kernels import bench

SHAPES = {
    "three_region_attention": "1,2,24,32",
    "layer_norm": "6,32",
    "rms_norm": "6,32",
    "sandwich_layer_norm": "6,32",
    "sandwich_rms_norm": "6,32",
    "linear_cross_entropy": "6,32,40",
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)


@pytest.mark.parametrize("op", bench.OPS)
def test_every_op_is_raced(op, capsys):
    options = ["--layout", "4,2,5"] if op == "three_region_attention" else []
    assert (
        bench.main(["--op", op, "--shape", SHAPES[op], "--seconds", "1e-3", "--device", "cpu", *options]) == 0
    )
    printed = capsys.readouterr().out
    forward, both = printed.split("forward and backward")
    assert f"{op} (" in forward and "differs from ours" not in printed
    if op == "three_region_attention":
        assert "keys a query" in forward and "SDPA, dense causal" in both
        assert "FlexAttention, our mask" in forward and "left out" not in forward
        assert "left out: NotImplementedError: FlexAttention has no backward pass on a CPU" in both
    else:
        assert forward.count("eager PyTorch") == both.count("torch.compile") == 1


def test_what_computes_something_else_is_left_out():
    x = torch.ones(3, requires_grad=True)
    calls = {
        bench.OURS: lambda: 2 * x,
        "right": lambda: x + x,
        "wrong": lambda: 3 * x,
        "other": lambda: x - 1,
    }
    subject = bench.Subject("double", [x], calls, differs=("other",))
    rows, skipped = bench.race(subject, "forward", 1e-4)
    assert [row.contender for row in rows] == [bench.OURS, "right", "other"]
    assert list(skipped) == ["wrong"] and "differs from ours by 5.0e-01" in skipped["wrong"]


def test_nan_in_any_result_is_another_result():
    x = torch.ones(3, requires_grad=True)
    calls = {bench.OURS: lambda: (x + x, 3 * x), "half": lambda: (2 * x, x * torch.nan)}
    rows, skipped = bench.race(bench.Subject("two", [x], calls), "forward", 1e-4)
    assert [row.contender for row in rows] == [bench.OURS] and list(skipped) == ["half"]


def test_the_plot_shows_each_direction(tmp_path):
    x = torch.ones(3, requires_grad=True)
    subject = bench.Subject("double", [x], {bench.OURS: lambda: 2 * x})
    results = {name: bench.race(subject, name, 1e-4)[0] for name in bench.DIRECTIONS}
    bench.draw("double", results, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_too_large_a_shape_is_one_line(capsys):
    assert bench.main(["--shape", "4096,4096,65536,4096", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.endswith("needs more memory than there is; take a smaller one\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4,x"], "must be positive whole numbers with commas between, got '4,x'"),
        (["--shape", "4,5"], "three_region_attention takes B,H,T,D, got 2 numbers"),
        (["--op", "rms_norm", "--layout", "1,2,3"], "only three_region_attention has a layout, not rms_norm"),
        (["--layout", "1,2"], "must be block_size,window_blocks,num_pivots"),
        (["--seconds", "nan"], "must be positive, got nan"),
        (["--device", "nowhere"], "argument --device"),
        (["--device", "meta"], "argument --device: must be cpu or cuda, got meta"),
        (
            ["--plot", "absent/a.png"],
            "argument --plot: must be a file in a folder that exists, ending in .png",
        ),
        (["--plot", "a.txt"], "argument --plot: must be a file in a folder that exists, ending in .png"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
