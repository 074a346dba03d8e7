# SPDX-License-Identifier: Apache-2.0
"""Two sets of pictures, or a run and a set, compared as a user would: figures, files, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import cogview.commands.evaluate
from cogview.cli import main
from cogview.commands.evaluate import Evaluate, evaluate
from cogview.commands.evaluate_run import RunTask, _best
from cogview.commands.outlet import Outlet
from cogview.evaluation.frechet import FeatureStatistics, frechet_distance
from cogview.evaluation.inception_score import InceptionScore
from cogview.evaluation.pictures import PictureFolder, blurred
from cogview.evaluation.set_statistics import load_statistics, picture_statistics
from cogview.files import read_json, write_json
from cogview.generation.engine import DrawOptions
from cogview.run import load_run
from cogview.seeding import derive_seed


class Means:
    """A network of four features: the mean of each colour, and the height of a step."""

    name, distance, score, width = "Means", "Frechet distance (Means)", "class score (Means)", 4

    def __call__(self, images):
        pixels = images.double() / 255
        step = pixels.diff(dim=3).abs().mean((1, 2, 3))
        return torch.cat([pixels.mean((2, 3)), step[:, None]], 1)

    def class_logits(self, features):
        return features * 10


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setattr(cogview.commands.evaluate, "_network", lambda options: Means())


def save_pictures(folder, *, count=12, side=16, seed=0):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index in range(count):
        pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def by_name(figures):
    return {figure.name: figure for figure in figures}


def compare(first, second, out, **changes):
    return by_name(evaluate(Evaluate(first, second, out, device="cpu", progress=False, **changes)))


def test_two_folders_are_compared_under_each_blur(tmp_path):
    first, second = save_pictures(tmp_path / "a"), save_pictures(tmp_path / "b", count=9, seed=1)
    out = tmp_path / "out"
    figures = compare(first, second, out, radii=(0, 2), batch_size=5, splits=3)

    def statistics(folder, radius):
        statistics = FeatureStatistics(4)
        for path in sorted(folder.iterdir()):
            picture = Image.open(path).filter(ImageFilter.GaussianBlur(radius))
            statistics.update(Means()(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]))
        return statistics

    for radius in (0, 2):
        expected = frechet_distance(statistics(first, radius), statistics(second, radius))
        between = figures[f"Frechet distance (Means), blur {radius}"].between
        assert between == pytest.approx(expected, rel=1e-6)
    assert (figures["pictures"].first, figures["pictures"].second) == (12, 9)
    assert figures["class score (Means)"].first > 1
    assert not any("FID" in name for name in figures)  # It is none without the network that defines it.
    with open(out / "evaluation.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["figure", str(first), str(second), "between"]
    assert [row[0] for row in rows[1:]] == list(figures)
    assert json.loads((out / "evaluation.json").read_text())["figures"][0]["first"] == 12
    with Image.open(out / "evaluation.png") as plot:
        assert plot.width > 300


def test_saved_statistics_stand_for_their_pictures(tmp_path):
    first, second = save_pictures(tmp_path / "a"), save_pictures(tmp_path / "b", seed=1)
    before = compare(first, second, tmp_path / "out", radii=(0, 1))
    saved = tmp_path / "out" / "reference.safetensors"
    # A batch of more pictures than there are is all of them.
    after = compare(first, saved, tmp_path / "again", radii=(0, 1), batch_size=10**20)
    assert after == before
    assert load_statistics(saved).side == 16


def test_a_blurred_picture_is_that_of_pillow_and_radius_zero_changes_nothing():
    images = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    assert blurred(images, 0) is images
    picture = Image.fromarray(images[1].permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(2))
    assert torch.equal(blurred(images, 2)[1], torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def test_a_run_draws_the_captions_of_a_folder_and_describes_its_pictures(run_folder, tmp_path):
    real = save_pictures(tmp_path / "real", count=5)
    captions = ["a handwritten one", "the scanned two", "a handwritten one", "一个手写的数字三", "a tiny six"]
    lines = [f"{index}.png\t{caption}" for index, caption in enumerate(captions)]
    (real / "captions.tsv").write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="drawn has 4 pictures, not more than"):
        figures = compare(run_folder, real, out, radii=(0,), candidates=2, captions=4)
    drawn = out / "drawn"
    assert len(list(drawn.glob("*.png"))) == 4
    assert list(json.loads((drawn / "captions.json").read_text(encoding="utf-8")).values()) == captions[:4]
    assert figures["pictures"].first == 4
    assert figures["CapLoss"].first > 0
    assert figures["CapLoss"].second > 0
    assert 0 <= figures["characters of captions that match, share"].second <= 1
    # Gone on with, the same pictures; asked for something else, none that are not that.
    (drawn / "000001.png").unlink()
    with pytest.warns(UserWarning, match="not more than"):
        assert compare(run_folder, real, out, radii=(0,), candidates=2, captions=4) == figures
    with pytest.raises(ValueError, match="was started with seed = 0, now 1"):
        compare(run_folder, real, out, radii=(0,), candidates=2, captions=4, seed=1)
    with pytest.raises(ValueError, match="was started with --num = 2, now 1"):
        compare(run_folder, real, out, radii=(0,), captions=4)
    settings = read_json(out / "drawn.json")
    write_json(out / "drawn.json", {**settings, "weights": "0123"})
    with pytest.raises(ValueError, match="was started with another run A: weights = '0123', now '"):
        compare(run_folder, real, out, radii=(0,), candidates=2, captions=4)


def test_the_best_candidate_by_cap_loss_is_taken(run_folder):
    run, text = load_run(run_folder, "cpu"), "a handwritten one"
    (best,) = _best(run, [text], [0], RunTask("", "", candidates=5))
    drawn = run.draw(run.requests([text], [derive_seed(0, 0)]), 5, DrawOptions(run.sampling))
    losses = [drawing.loss for batch in drawn for _, drawing in batch]
    assert best.loss == pytest.approx(min(losses))
    assert losses[0] > min(losses)  # Else the first one would do.


def test_a_run_is_not_drawn_from_before_its_pictures_can_be_compared(run_folder, tmp_path):
    large, small = save_pictures(tmp_path / "large", side=32), save_pictures(tmp_path / "small")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="got 16x16 and 32x32 pixels"):
        compare(run_folder, large, out)
    with pytest.raises(FileNotFoundError, match=r"has no captions\.tsv"):
        compare(run_folder, small, out)
    compare(small, small, out, radii=(0,))
    with pytest.raises(ValueError, match="a run is compared with a folder of pictures, got the statistics"):
        compare(run_folder, out / "reference.safetensors", out)
    assert not (out / "drawn").exists()


def test_a_run_rebuilds_pictures_through_its_tokenizer(run_folder, tmp_path):
    real = save_pictures(tmp_path / "real", count=6)
    out = tmp_path / "out"
    (real / "captions.tsv").write_text("2.png\ta handwritten two\n5.png\ta handwritten one")
    figures = compare(run_folder, real, out, radii=(0,), rebuild=True, captions=5)
    assert figures["pictures"].first == 5
    assert json.loads((out / "rebuilt" / "captions.json").read_text()) == {"2.png.png": ["a handwritten two"]}
    assert figures["CapLoss"].first > 0
    run = load_run(run_folder, "cpu")
    expected = run.decode(run.encode(real / "2.png"))
    with Image.open(out / "rebuilt" / "2.png.png") as rebuilt:
        assert np.array_equal(np.asarray(rebuilt), np.asarray(expected))


def refused(capsys, *words):
    code = main(["evaluate", *map(str, words), "--device", "cpu", "--blur", "0"])
    said = capsys.readouterr().err.splitlines()
    assert code == 2
    problems = [line for line in said if line.startswith("cogview evaluate:")]
    assert len(problems) == 1
    return problems[0]


def test_wrong_sets_are_told_in_one_line(tmp_path, capsys):
    first = save_pictures(tmp_path / "a")
    large = save_pictures(tmp_path / "large", side=32)
    out = ("--out", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no pictures" in refused(capsys, first, empty, *out)
    for second in (first, empty):
        assert "folder of pictures not found" in refused(capsys, tmp_path / "none", second, *out)
    assert "got 16x16 and 32x32 pixels; --size 16 scales both" in refused(capsys, first, large, *out)
    assert "two sets are compared" in refused(capsys, first, *out)
    assert "--size must be at most 16,384, got 99,999,999" in refused(
        capsys, first, first, "--size", "99999999", *out
    )
    mixed = tmp_path / "mixed"
    shutil.copytree(first, mixed)
    shutil.copy(large / "0.png", mixed / "other.png")
    assert "must be of one size, got 12 of 16x16 and 1 of 32x32" in refused(capsys, mixed, first, *out)
    Image.new("RGB", (8, 4)).save(empty / "wide.png")
    assert "must be squares, got 8x4 pixels" in refused(capsys, empty, first, *out)
    single = save_pictures(tmp_path / "single", count=1)
    assert f"{single} has one picture, of which there is no" in refused(capsys, first, single, *out)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"no tensors")
    assert "is not a safetensors file" in refused(capsys, first, other, *out)
    assert not (tmp_path / "out").exists()


def test_pictures_that_cannot_be_read_are_counted_and_listed(tmp_path, capsys):
    first, second = save_pictures(tmp_path / "a"), save_pictures(tmp_path / "b")
    (first / "3.png").write_bytes((first / "3.png").read_bytes()[:60])
    (first / "bad.jpg").write_text("no picture")
    out = ("--out", tmp_path / "out")
    said = refused(capsys, first, second, *out)
    assert "2 of 13 pictures in" in said
    assert "3.png cannot be read" in said
    assert "bad.jpg cannot be read" in said
    words = [
        "evaluate",
        str(first),
        str(second),
        *map(str, out),
        "--device",
        "cpu",
        "--blur",
        "0",
        "--skip-bad",
    ]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "2 pictures left out of" in said.err
    assert "11" in said.out


def test_fewer_pictures_than_features_are_told(tmp_path):
    folder = save_pictures(tmp_path / "a", count=3)
    with pytest.warns(UserWarning, match="has 3 pictures, not more than the 4 features of Means"):
        compare(folder, folder, tmp_path / "out", radii=(0,))


@pytest.mark.parametrize(("count", "splits", "parts"), [(12, 10, 6), (12, 3, 3), (3, 10, 1), (1, 10, 1)])
def test_no_part_of_the_score_is_a_picture_alone(tmp_path, count, splits, parts):
    """Of one picture it is 1, whatever the picture is."""
    pictures = PictureFolder(save_pictures(tmp_path / "a", count=count), progress=False)
    options = {"radii": (0,), "splits": splits, "progress": False}
    expected = InceptionScore(count, parts)
    for images in pictures.batches(4):
        expected.update(Means().class_logits(Means()(images)))
    with pytest.warns(UserWarning, match=rf"has {count} pictures, fewer than 10 for each of {parts} parts"):
        got = picture_statistics(pictures, Means(), "cpu", **options).score
    assert got == expected.result()


def test_a_blur_that_saved_statistics_lack_is_told(tmp_path):
    first, second = save_pictures(tmp_path / "a"), save_pictures(tmp_path / "b", seed=1)
    compare(first, second, tmp_path / "out", radii=(0, 1))
    saved = tmp_path / "out" / "reference.safetensors"
    with pytest.warns(UserWarning, match="have no blur of 3 pixels: it is left out"):
        figures = compare(first, saved, tmp_path / "again", radii=(0, 3))
    assert not any(name.endswith("blur 3") for name in figures)


def test_the_sheet_of_drawn_pictures_is_none_of_a_set_and_is_told(tmp_path, capsys):
    real, picture = save_pictures(tmp_path / "real"), Image.new("RGB", (16, 16))
    outlet = Outlet(f"{tmp_path}/drawn")
    for number in range(4):
        outlet.write_picture(f"{number:04d}", picture, {"prompt": "a tiger", "seed": 0, "candidate": number})
    outlet.write_sheet([[picture] * 4], {"prompt": "a tiger", "seed": 0})
    with pytest.warns(UserWarning, match="drawn has 4 pictures, not more than"):
        figures = compare(tmp_path / "drawn", real, tmp_path / "out", radii=(0,))
    assert figures["pictures"].first == 4
    assert "drawn, as sheets or plots of cogview beside the pictures: sheet.png" in capsys.readouterr().err


def test_results_among_the_pictures_are_refused_before_any_work(run_folder, tmp_path, monkeypatch, capsys):
    first, second = save_pictures(tmp_path / "a"), save_pictures(tmp_path / "b", seed=1)
    (tmp_path / "link").symlink_to(second)
    with monkeypatch.context() as patch:
        patch.setattr(cogview.commands.evaluate, "_network", None)
        patch.setattr(cogview.commands.evaluate, "load_run", None)
        for out in (first, second, first / "deep" / "out", tmp_path / "link" / "out"):
            with pytest.raises(ValueError, match=r"--out .* lies in .*; name a folder elsewhere with --out"):
                compare(first, second, out)
        patch.chdir(first)
        said = refused(capsys, ".", "../b")
        assert "--out evaluation lies in ., whose pictures are compared" in said
        with pytest.raises(ValueError, match=r"--out .* lies in .*b, whose pictures"):
            compare(run_folder, second, second / "out")
        for name, rebuild in (("drawn", False), ("rebuilt", True)):
            inside = tmp_path / "out" / name
            inside.mkdir(parents=True)
            with pytest.raises(ValueError, match=f"the run would draw into .*{name}, with whose pictures"):
                compare(run_folder, inside, tmp_path / "out", rebuild=rebuild)
    assert not (first / "deep").exists()
    # Beside the pictures is elsewhere, as is the folder around them.
    compare(first, second, tmp_path, radii=(0,))


def test_sizes_that_differ_can_be_made_the_same(tmp_path):
    first, large = save_pictures(tmp_path / "a"), save_pictures(tmp_path / "large", side=32)
    assert compare(first, large, tmp_path / "out", radii=(0,), side=8)["pictures"].second == 12


def test_the_memory_of_statistics_does_not_depend_on_the_number_of_pictures(tmp_path):
    folder = PictureFolder(save_pictures(tmp_path / "a"), progress=False)
    assert [len(batch) for batch in folder.batches(5)] == [5, 5, 2]
    assert FeatureStatistics(4).tensors().keys() == {"count", "mean", "scatter"}
