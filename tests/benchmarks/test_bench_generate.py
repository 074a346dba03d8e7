# SPDX-License-Identifier: Apache-2.0
"""The rivals of ``benchmarks.bench_generate`` do the same work."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import bench_generate
from benchmarks.rivals.generation import reprojection
from cogview.generation.engine import DrawOptions, Task, decode, prefill
from tests.model.helpers import small_model


def test_the_originals_algorithm_draws_the_same_codes():
    model, prompt, seeds = small_model(scale=5.0), torch.randint(16, (7,)), [5, 6, 7]
    sampling = DrawOptions().sampling
    ours = decode(model, prefill(model, [prompt.tolist()] * 3, 9), Task([range(16)], 9, seeds), DrawOptions())
    assert torch.equal(reprojection(model, prompt, 9, 16, sampling, seeds), ours)
    assert len(ours.unique(dim=0)) == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("parallel", value) for value in ("0", "-1", "10", str(10**20))),
        ("batch", "0"),
        ("batch", str(10**20)),
        ("ranked", "-1"),
        ("ranked", str(10**20)),
        ("seconds", "nan"),
        ("seconds", "-1"),
    ],
)
def test_a_number_that_cannot_be_is_one_line_that_names_it(option, value, capsys):
    with pytest.raises(SystemExit):
        bench_generate.parse(["--shape", "tiny", f"--{option}", value])
    assert f"error: --{option} must be " in capsys.readouterr().err.splitlines()[-1]


def test_a_run_tells_and_saves_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_generate, "COPIED", {"cpu": 1 << 16})
    monkeypatch.setattr(bench_generate.importlib.util, "find_spec", lambda _: None)  # Hugging Face is slow
    arguments = ["--shape", "tiny", "--seconds", "0", "--parallel", "3", "--ranked", "2", "--device", "cpu"]
    assert bench_generate.main([*arguments, "--save", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "transformers is not installed" in shown.err
    document = json.loads((tmp_path / "generate" / "tiny-fp32.json").read_text())
    (result,) = document["results"]
    assert set(result["drawings"]) == {"ours", "ours, 3 codes a step", "re-projection"}
    assert result["share_of_floor"] == pytest.approx(result["floor_ms_a_step"] / result["ms_a_step"])
    C = 64  # width: a layer's weights, the head of 16 codes, the cache of 2 rows on average
    floor = (12 * C * C + 17 * C + 16 * C + 2 * C * 2 * (4 + 4.5)) * 4
    assert result["floor_ms_a_step"] * result["copy_gb_s"] * 1e6 == pytest.approx(floor)
    assert document["ranked"]["candidates"] == 2 and "drawn and ranked" in shown.out
