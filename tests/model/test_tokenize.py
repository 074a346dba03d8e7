# SPDX-License-Identifier: Apache-2.0
"""From pictures to rows to a trained model: the same losses by either way, lazily and validated."""

import dataclasses
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cogview.training.pipeline
from cogview.cli import main
from cogview.data.order import batch_indices
from cogview.data.rows import open_rows
from cogview.data.tokens import TokenDataset
from cogview.training.pipeline import TrainModel, TrainTokenizers, train_model, train_tokenizers
from cogview.training.transformer import TrainingData, TransformerTrainer
from tests.model.helpers import small_model, tiny_preset
from tests.model.test_training_transformer import CONFIG, dataset

OTHER_TOKENIZERS = "were written with other tokenizers than those of"


@pytest.fixture
def tokenizers_only(run_folder, tmp_path):
    """Run folders that hold tokenizers, by name."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("tokenizers.json", "text_tokenizer.model", "image_tokenizer.safetensors"):
            shutil.copy(run_folder / file, folder)
        return folder

    return make


def preset(**changes):
    tiny = tiny_preset(4)
    return dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, **changes))


def trained(data, out, **options):
    given = {"preset": preset(), "device": "cpu", "progress": False, **options}
    return train_model(TrainModel(data, out, **given))


def test_rows_train_to_the_losses_of_the_pictures(photos, tokenizers_only, tmp_path, capsys):
    from_pictures = trained(photos, tokenizers_only("a"))
    run = tokenizers_only("b")
    words = ["tokenize", "--data", str(photos), "--out", str(tmp_path / "rows"), "--run", str(run)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "6 rows of 6 images, 80 tokens each" in shown.out and "write rows: image 6 of 6" in shown.err
    assert f"train --data {tmp_path / 'rows'} --out {run}" in shown.out
    before = (tmp_path / "rows" / "rows.bin").read_bytes()
    assert main(words) == 0 and (tmp_path / "rows" / "rows.bin").read_bytes() == before
    assert trained(tmp_path / "rows", run, workers=1) == from_pictures
    assert {path.name for path in run.iterdir()} == {
        path.name for path in tmp_path.joinpath("a").iterdir()
    } - {"rows"}


def test_a_run_that_goes_on_encodes_no_picture_anew(photos, tokenizers_only, monkeypatch):
    out = tokenizers_only("a")
    trained(photos, out)
    monkeypatch.setattr(cogview.data.row_writer._Encoder, "codes", None)
    monkeypatch.setattr(cogview.data.folder, "read_pixels", None)
    more = preset(steps=6)
    assert len(trained(photos, out, preset=more)["image_loss"]) == 6


def test_rows_of_other_tokenizers_and_rows_as_pictures_are_refused(photos, tokenizers_only, tmp_path, capsys):
    run, rows = tokenizers_only("a"), tmp_path / "rows"
    words = ["tokenize", "--data", str(photos), "--out", str(rows), "--run", str(run)]
    assert main(words) == 0
    other = tokenizers_only("b")
    text = (other / "text_tokenizer.model").read_bytes()
    (other / "text_tokenizer.model").write_bytes(text + b"\x1a\x00")  # an empty field, which means nothing
    with pytest.raises(ValueError, match=OTHER_TOKENIZERS):
        trained(rows, other)
    with pytest.raises(ValueError, match="holds rows of tokens; a tokenizer is trained on pictures"):
        train_tokenizers(TrainTokenizers(rows, tmp_path / "c", tiny_preset()))
    capsys.readouterr()
    assert main([*words[:-1], str(other)]) == 2
    assert "holds rows of other tokenizers; choose another folder" in capsys.readouterr().err
    assert main([*words, "--max-text-tokens", "0"]) == 2
    assert "cogview tokenize: --max-text-tokens must be from 1 to 65536, got 0" in capsys.readouterr().err


def test_bad_pictures_are_left_out_of_both_trainings(photos, tokenizers_only, tmp_path, capsys):
    (photos / "2.png").write_bytes((photos / "2.png").read_bytes()[:400])
    out = tokenizers_only("a")
    with pytest.raises(
        ValueError, match=r"1 of 6 images .* leave them out with --skip-bad: .*2\.png cannot be"
    ):
        trained(photos, out)
    assert not (out / "rows").exists()
    trained(photos, out, skip_bad=True, progress=True)
    assert f"1 images left out; {out / 'rows' / 'skipped.tsv'} says why" in capsys.readouterr().err
    assert "2.png\t" in (out / "rows" / "skipped.tsv").read_text()
    assert len(open_rows(out / "rows")) == 5
    trained(photos, out, skip_bad=True, preset=preset(steps=5))
    tiny = tiny_preset()
    short = dataclasses.replace(
        tiny, image_tokenizer_train=dataclasses.replace(tiny.image_tokenizer_train, steps=2)
    )
    given = TrainTokenizers(photos, tmp_path / "b", short, "cpu", progress=False, skip_bad=True)
    assert len(train_tokenizers(given)["reconstruction"]) == 2
    assert "2.png cannot be read" in (tmp_path / "b" / "skipped.tsv").read_text()


def test_a_first_try_that_reads_no_picture_binds_no_folder(photos, tokenizers_only, tmp_path, capsys):
    out, empty = tmp_path / "rows", tmp_path / "empty"
    empty.mkdir()
    (empty / "bad.png").write_text("no picture")
    (empty / "captions.tsv").write_text("bad.png\ta photo\n")
    words = ["tokenize", "--out", str(out), "--run", str(tokenizers_only("a")), "--data"]
    for _ in range(2):
        assert main([*words, str(empty)]) == 2
        assert "no picture could be read" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == ["skipped.tsv"]
        assert len((out / "skipped.tsv").read_text().splitlines()) == 1
    assert main([*words, "pipe:false"]) == 2
    assert [path.name for path in out.iterdir()] == ["skipped.tsv"]
    assert main([*words, str(photos)]) == 0
    assert len(open_rows(out)) == 6 and not (out / "skipped.tsv").read_text()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("false", "its exit status is 1"),
        ("nosuchcommand", "its exit status is 127"),
        ("kill -9 $$", "signal 9 ended it"),
        ("true", "what it writes is no whole tar file (empty file)"),
        ("echo hello", "what it writes is no whole tar file (truncated header)"),
    ],
)
def test_a_command_that_fails_is_told_in_words(tokenizers_only, tmp_path, capsys, command, reason):
    words = ["--out", str(tmp_path / "rows"), "--run", str(tokenizers_only("a"))]
    assert main(["tokenize", "--data", f"pipe:{command}", *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"cogview tokenize: pipe:{command} failed: {reason}; repeat the command to go on from there"
    )


def scalars(folder, name):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_validation_is_told_at_each_checkpoint_and_changes_no_training(
    photos, tokenizers_only, capsys, monkeypatch
):
    probe = tokenizers_only("probe")
    trained(photos, probe)
    rows = open_rows(probe / "rows")
    share = next(share / 10 for share in range(1, 10) if 1 < len(rows.chosen(share / 10)) < 5)
    given = {"preset": preset(steps=6, validation=share)}

    out = tokenizers_only("whole")
    whole = trained(photos, out, **given, progress=True)
    assert capsys.readouterr().err.count("validation: image_loss ") == 2
    assert [step for step, _ in scalars(out, "train/validation_image_loss")] == [2, 5]
    assert all(value > 0 for _, value in scalars(out, "train/validation_text_loss"))

    cut, real = tokenizers_only("cut"), TransformerTrainer.step

    def dies_in_step_four(self, step, batch):
        if step == 4:
            raise RuntimeError("killed")
        return real(self, step, batch)

    monkeypatch.setattr(TransformerTrainer, "step", dies_in_step_four)
    with pytest.raises(RuntimeError, match="killed"):
        trained(photos, cut, **given)
    monkeypatch.setattr(TransformerTrainer, "step", real)
    assert trained(photos, cut, **given) == whole
    assert scalars(cut, "train/validation_image_loss") == scalars(out, "train/validation_image_loss")
    with pytest.raises(ValueError, match=r"started with train\.validation = "):
        trained(photos, cut, preset=preset(steps=6))
    monkeypatch.setattr(TransformerTrainer, "validate", lambda self: {})
    assert trained(photos, tokenizers_only("silent"), **given) == whole


def test_validation_leaves_out_no_more_images_than_it_has_batches():
    """Of 20 images and batches of 11 rows, the first 11 alone were looked at."""
    seen = []

    class Noted(TokenDataset):
        def batch(self, step, batch_size, **options):
            seen.extend(batch_indices(CONFIG.seed, step, batch_size, len(self)))
            return super().batch(step, batch_size, **options)

    whole = dataset()
    noted = Noted(whole.vocab, whole.rows, whole.length)
    config = dataclasses.replace(CONFIG, batch_size=11)
    TransformerTrainer(small_model(), TrainingData(whole, noted), config).validate()
    assert sorted(seen) == list(range(20))


def test_the_validation_loss_is_that_of_its_images_without_dropout():
    data = TrainingData(dataset(), dataset())
    trainer = TransformerTrainer(small_model(dropout=0.3).train(), data, CONFIG)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trainer.validate()
    assert trainer.model.training and torch.equal(torch.get_rng_state(), before)
    assert trainer.validate() == first
    parts = TransformerTrainer(trainer.model, data, dataclasses.replace(CONFIG, batch_size=20, accumulate=10))
    # Other batches, so other captions and layouts: near, not equal.
    assert parts.validate()["image_loss"] == pytest.approx(first["image_loss"], rel=0.02)
