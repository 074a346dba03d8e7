# SPDX-License-Identifier: Apache-2.0
"""Picks among candidates, and the rank curve of a run on the digits."""

from __future__ import annotations

import csv
import re
import shutil

import pytest
import torch
from PIL import Image

from cogview.demo.ranking import SETTINGS, Ranking, ranking_table, study_ranking
from cogview.demo.run import DrawnWith, fingerprint_run
from cogview.evaluation.rank_curve import costs_of_pickers, picks, rank_curve
from cogview.settings import claim_settings


def test_a_pick_is_the_cheapest_of_each_whole_group():
    cost = torch.tensor([[3.0, 1.0, 2.0, 0.0, 9.0], [0.0, 0.0, 5.0, 4.0, -1.0]])
    assert picks(cost, 1).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert picks(cost, 2).tolist() == [
        [1, 3],
        [0, 3],
    ]  # The fifth is in no group.
    assert picks(cost, 5).tolist() == [[3], [4]]


def test_the_curve_counts_right_picks_over_all_groups_and_measures_the_first():
    is_right = torch.tensor([[False, True, True, False], [False, False, True, False]])
    losses = torch.tensor([[0.3, 0.1, 0.4, 0.2], [0.1, 0.2, 0.3, 0.4]])
    costs = costs_of_pickers({"CapLoss": losses}, is_right, seed=0)
    measured = []

    def distance_of(places):
        measured.append(places.tolist())
        return float(len(measured))

    curve = rank_curve(costs, is_right, distance_of, counts=(1, 2, 4, 8))
    right = {(point.picker, point.candidates): point.right for point in curve}
    assert right["CapLoss", 1] == right["chance", 1] == right["the judge", 1] == 3 / 8
    assert right["CapLoss", 2] == 2 / 4  # Of the pairs it picks 1 and 3, then 0 and 2.
    assert right["CapLoss", 4] == 1 / 2
    assert right["the judge", 2] == 3 / 4
    assert right["the judge", 4] == 1
    assert ("CapLoss", 8) not in right
    assert measured[:3] == [[0, 0], [1, 0], [1, 0]]
    assert [point.distance for point in curve] == [float(number + 1) for number in range(len(curve))]


def test_chance_is_the_same_for_the_same_seed_and_knows_nothing_of_the_candidates():
    is_right = torch.rand(400, 4) < 0.5
    chance = costs_of_pickers({}, is_right, seed=1)["chance"]
    assert torch.equal(chance, costs_of_pickers({}, ~is_right, seed=1)["chance"])
    assert not torch.equal(chance, costs_of_pickers({}, is_right, seed=2)["chance"])


class Means:
    """A network of three features, the mean of each colour."""

    name, distance, score, width = "Means", "Frechet distance (Means)", "class score (Means)", 3

    def __call__(self, images):
        return images.float().mean((2, 3))


def test_a_run_on_the_digits_gets_its_curve_and_draws_once(run_folder, tmp_path, monkeypatch):
    out = tmp_path / "ranking"
    options = Ranking(run_folder, out, run_folder, candidates=2, prompts=12, device="cpu", progress=False)
    curve = study_ranking(options, Means())
    pickers = ["CapLoss", "CapLoss of the captioner", "chance", "the judge"]
    assert [(point.picker, point.candidates) for point in curve] == [(p, n) for p in pickers for n in (1, 2)]
    assert curve[0][1:] == curve[2][1:]  # The same run ranks twice.
    assert curve[7].right >= max(point.right for point in curve)
    with open(out / "rank_curve.csv", newline="") as file:
        assert [row[:2] for row in csv.reader(file)][:2] == [["picker", "candidates"], ["CapLoss", "1"]]
    with Image.open(out / "rank_curve.png") as plot:
        assert plot.width > 500
    assert "best of 2" in ranking_table(curve)

    monkeypatch.setattr("cogview.demo.run.generate_codes", None)  # Nothing is drawn a second time.
    assert study_ranking(options, Means()) == curve
    with pytest.raises(ValueError, match="was started with seed = 0, now 1"):
        study_ranking(Ranking(run_folder, out, candidates=2, prompts=12, seed=1, progress=False), Means())


def test_no_part_of_it_is_silent(run_folder, tmp_path, capsys):
    study_ranking(Ranking(run_folder, tmp_path, run_folder, candidates=2, prompts=3, device="cpu"), Means())
    said = capsys.readouterr().err
    for part in (
        "draw and rerank",
        "rank by the captioner",
        "judge",
        "features of real pictures",
        "rank curve",
    ):
        first, last = (f"\n{part}: .* {count} of " for count in (r"\d+", r"(\d+)"))
        assert re.search(first, f"\n{said}"), part
        assert re.search(rf"{last}\1[,\n]", f"\n{said}"), part


def test_another_run_in_the_same_folder_is_named_by_its_option(run_folder, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    options = {"candidates": 2, "prompts": 3, "device": "cpu", "progress": False}
    claim_settings(out / SETTINGS, DrawnWith("0123", 2, ["a", "b", "c"], 0))
    with pytest.raises(ValueError, match=r"another --run \(now .*\): weights = '0123', now '"):
        study_ranking(Ranking(run_folder, out, **options), Means())
    claim_settings(other / SETTINGS, DrawnWith(fingerprint_run(run_folder), 2, ["a", "b"], 0))
    with pytest.raises(ValueError, match="started with number of prompts = 2, now 3; repeat"):
        study_ranking(Ranking(run_folder, other, **options), Means())


def test_runs_that_no_judge_can_read_are_refused(run_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    (other / "text_tokenizer.model").write_bytes(b"another")
    with pytest.raises(ValueError, match="captioner must have the tokenizers of"):
        study_ranking(Ranking(run_folder, tmp_path / "out", other), Means())
    settings = (other / "tokenizers.json").read_text().replace('"digits"', '"photos"', 1)
    (other / "tokenizers.json").write_text(settings)
    with pytest.raises(ValueError, match="run must be one on digits or emoji"):
        study_ranking(Ranking(other, tmp_path / "out"), Means())
    with pytest.raises(ValueError, match="candidates must be at least 1 and at most 100,000, got 100,001"):
        study_ranking(Ranking(run_folder, tmp_path / "out", candidates=100_001), Means())
    assert not (tmp_path / "out").exists()
