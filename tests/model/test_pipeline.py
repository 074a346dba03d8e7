# SPDX-License-Identifier: Apache-2.0
"""From a folder of captioned pictures to a run, as a user of the Python functions would go."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.presets import PRESETS
from cogview.run import load_run
from cogview.settings import load_model_settings, load_tokenizer_settings
from cogview.training.pipeline import TrainModel, TrainTokenizers, train_model, train_tokenizers


def tiny(steps=2, **changes):
    """The preset ``small`` with narrow networks and next to no training."""
    preset = PRESETS["small"]
    return dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, num_layers=1, hidden_size=64, num_heads=2),
        train=dataclasses.replace(preset.train, steps=steps, batch_size=4),
        image_tokenizer=dataclasses.replace(preset.image_tokenizer, channels=8, code_dim=8),
        image_tokenizer_train=dataclasses.replace(preset.image_tokenizer_train, steps=steps, batch_size=4),
        **changes,
    )


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "my photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for index in range(6):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        lines += [f"{index}.png\ta photo of thing number {index}", f"{index}.png\t第{index}号东西的照片"]
    (folder / "captions.tsv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def train_both(photos, out, preset=None):
    options = {"data": str(photos), "out": str(out), "device": "cpu", "progress": False}
    train_tokenizers(TrainTokenizers(**options, preset=preset or tiny()))
    return train_model(TrainModel(**options, preset=preset))


def test_english_and_chinese_captions_with_paths_as_text(photos, tmp_path):
    out = tmp_path / "run"
    preset = tiny()
    train_both(photos, out, preset)
    run = load_run(str(out))
    assert load_tokenizer_settings(out).preset == "small"
    assert run.model.config.num_layers == 1
    assert run.max_text_tokens == 30
    for caption in ("a photo of thing number 3", "第3号东西的照片"):
        assert run.tokenizers.text.unknown_pieces(caption) == []


def test_five_captions_are_enough_and_long_ones_keep_their_end(photos, tmp_path):
    long = " ".join(f"word{index}" for index in range(12))
    (photos / "captions.tsv").write_text("".join(f"{index}.png\t{long}\n" for index in range(5)))
    train_both(photos, tmp_path / "run", tiny(min_text_tokens=2))
    run = load_run(tmp_path / "run")
    assert run.max_text_tokens == len(run.tokenizers.text.encode(long)) > 2


def test_codes_that_look_alike_begin_alike_if_asked(photos, tmp_path):
    related = []
    for is_asked in (False, True):
        preset = tiny(steps=1)
        train = dataclasses.replace(preset.train, codebook_embeddings=is_asked, learning_rate=0.0)
        train_both(photos, tmp_path / str(is_asked), dataclasses.replace(preset, train=train))
        run = load_run(tmp_path / str(is_asked), "cpu")
        book = run.tokenizers.image.quantizer.embed.t()
        words = run.model.word_embeddings.weight[: len(book)]
        distances = torch.stack([torch.cdist(x, x).flatten() for x in (book, words)])
        related.append(torch.corrcoef(distances.double())[0, 1].item())
    assert related[1] > related[0] + 0.3


def test_train_takes_what_the_tokenizers_imply_and_refuses_the_rest(photos, tmp_path, monkeypatch):
    options = {"data": photos, "out": tmp_path, "device": "cpu", "progress": False}
    train_tokenizers(TrainTokenizers(**options, preset=tiny()))
    with pytest.raises(ValueError, match=r"8 x 8 codes of 512, preset 'tutorial' is made for 256 px"):
        train_model(TrainModel(**options, preset=PRESETS["tutorial"]))
    assert not (tmp_path / "model.json").exists()
    monkeypatch.setitem(PRESETS, "small", tiny())
    train_model(TrainModel(**options))
    settings = load_model_settings(tmp_path)
    assert settings.model.max_positions == 5 + 30 + 64
    assert settings.data == str(photos)


def test_a_bad_picture_is_found_before_anything_is_written(photos, tmp_path):
    (photos / "3.png").write_text("no picture")
    (photos / "5.png").write_bytes((photos / "5.png").read_bytes()[:700])
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"2 of 6 images .*3\.png cannot be read.*5\.png cannot be read"):
        train_both(photos, out)
    assert not out.exists()


def test_a_picture_that_went_bad_later_is_found_before_the_transformer_is_trained(photos, tmp_path):
    options = {"data": photos, "out": tmp_path, "device": "cpu", "progress": False}
    train_tokenizers(TrainTokenizers(**options, preset=tiny()))
    (photos / "3.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"1 of 6 images .*3\.png"):
        train_model(TrainModel(**options, preset=tiny()))
    assert not (tmp_path / "model.json").exists()


@pytest.mark.parametrize("function", ["train_image_tokenizer", "train"])
def test_a_call_that_fails_before_its_first_checkpoint_does_not_bind_the_folder(
    photos, tmp_path, monkeypatch, function
):
    def fails(*arguments, **named):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(f"cogview.training.pipeline.{function}", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_both(photos, tmp_path, tiny(steps=3))
    monkeypatch.undo()
    # What is trained stays bound: the tokenizers, where it was the transformer that failed.
    smaller = tiny(steps=3, text_pieces=3999 if function == "train_image_tokenizer" else 4000)
    smaller = dataclasses.replace(smaller, train=dataclasses.replace(smaller.train, batch_size=2))
    train_both(photos, tmp_path, smaller)
    with pytest.raises(ValueError, match=r"train\.batch_size = 2, now 4"):
        train_both(photos, tmp_path, dataclasses.replace(smaller, train=tiny(steps=3).train))


def test_what_the_data_mean_is_told(photos, tmp_path, capsys):
    options = {"data": photos, "out": tmp_path, "device": "cpu", "preset": tiny()}
    train_tokenizers(TrainTokenizers(**options))
    told = capsys.readouterr().err
    assert "pieces rather than 4000, as the 12 captions support no more" in told
    assert "check images: image 6 of 6" in told
    assert "\r" not in told
    train_model(TrainModel(**options))
    assert "1 layers of width 64 over rows of 99 tokens" in capsys.readouterr().err
