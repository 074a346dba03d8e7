# SPDX-License-Identifier: Apache-2.0
"""The commands that judge wall-clock time: what they print and when they fail, with times made up."""

from __future__ import annotations

import pytest

from benchmarks import bounds, host_time


@pytest.mark.parametrize(
    ("figures", "status", "said"), [((1.4, 1.1), 0, "met"), ((1.4, 1.3, 1.2), 1, "missed")]
)
def test_the_best_of_three_tries_decides(figures, status, said, monkeypatch, capsys):
    tries = iter(figures)
    monkeypatch.setattr(bounds, "BOUNDS", {"name": (lambda: next(tries), 1.15, "times as long")})
    assert bounds.main() == status
    assert capsys.readouterr().out == f"{said}: name: {figures[-1]:.2f} times as long, allowed 1.15\n"


def test_host_time_of_every_op(monkeypatch):
    monkeypatch.setattr(host_time, "SECONDS", 0.0)
    monkeypatch.setattr(host_time, "LEAST", 2)
    times = host_time.measure()
    assert set(times) == set(host_time.ops())
    for op, ways in times.items():
        assert "forward" in ways and all(us > 0 for us in ways.values())
        assert op in ("decode_attention", "decode_step") or {"recorded", "backward"} <= set(ways)


@pytest.mark.parametrize(("at_most", "status"), [("1.05", 1), ("1.6", 0)])
def test_a_slower_op_fails_the_comparison(at_most, status, monkeypatch, capsys, tmp_path):
    made_up = {host_time.ROOT: [9.0, 6.0], tmp_path: [4.0, 5.0]}  # by checkout, by round

    def child(root):
        return {"op": {"forward": made_up[root].pop()}}

    monkeypatch.setattr(host_time, "child", child)
    options = ["--against", str(tmp_path), "--rounds", "2", "--at-most", at_most]
    monkeypatch.setattr("sys.argv", ["host_time", *options])
    assert host_time.main() == status
    out = capsys.readouterr().out
    assert "6.0" in out and "4.0" in out and "1.50" in out
    assert ("above 1.05: op forward" in out) == bool(status)


def test_a_folder_without_the_package_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="was imported, which is elsewhere"):
        host_time.child(tmp_path)
