# SPDX-License-Identifier: Apache-2.0
"""What a run may go on with, and what it may not: steps, data, tokenizers, folders, and a second training."""

import dataclasses
import shutil

import pytest

from cogview.files import load_tensors, read_json, save_tensors
from cogview.parsing import parse
from cogview.run import load_run
from cogview.tokens.tokenizers import IMAGE_TOKENIZER
from cogview.training.image_tokenizer import read_history
from cogview.training.lock import RunLock
from cogview.training.pipeline import (
    TOKENIZER_HISTORY,
    TrainModel,
    TrainTokenizers,
    train_model,
    train_tokenizers,
)
from tests.model.helpers import save_photos
from tests.model.test_pipeline import tiny

SETTINGS = tiny(steps=2)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with pictures and a run on them: two steps of each training."""
    folder = tmp_path_factory.mktemp("begun")
    save_photos(folder / "photos")
    options = {"data": folder / "photos", "out": folder / "run", "device": "cpu", "progress": False}
    train_tokenizers(TrainTokenizers(**options, preset=SETTINGS))
    train_model(TrainModel(**options, preset=SETTINGS))
    return folder


@pytest.fixture
def moved(begun, tmp_path):
    """The same at another place."""
    return shutil.copytree(begun, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "content", ["[]", '{"reconstruction": 3}', '{"reconstruction": ["x"], "codes_used": []}']
)
def test_a_damaged_history_is_told_and_written_anew_once_it_is_removed(moved, content):
    run = moved / "run"
    before, path = read_history(run / TOKENIZER_HISTORY), run / TOKENIZER_HISTORY
    path.write_text(content)
    given = TrainTokenizers(moved / "photos", run, SETTINGS, "cpu", progress=False)
    with pytest.raises(
        ValueError, match=r"damaged: it holds no history of .*; remove it and .*safetensors, and"
    ):
        train_tokenizers(given)
    path.unlink()
    (run / IMAGE_TOKENIZER).unlink()
    assert train_tokenizers(given) == before == read_history(path)


def with_steps(steps, **changes):
    return dataclasses.replace(
        SETTINGS,
        train=dataclasses.replace(SETTINGS.train, steps=steps, **changes),
        image_tokenizer_train=dataclasses.replace(SETTINGS.image_tokenizer_train, steps=steps),
    )


def go_on(folder, preset, kind=TrainModel, data=None, **changes):
    train = {TrainModel: train_model, TrainTokenizers: train_tokenizers}[kind]
    options = {"out": folder / "run", "device": "cpu", "progress": False, "preset": preset, **changes}
    return train(kind(data or folder / "photos", **options))


def test_a_moved_run_takes_more_steps_on_moved_data(moved):
    first = load_run(moved / "run").model.word_embeddings.weight
    history = go_on(moved, with_steps(3, keep=1))
    assert len(history["image_loss"]) == 3
    assert read_json(moved / "run" / "model.json")["train"]["steps"] == 3
    assert read_json(moved / "run" / "model.json")["data"] == str(moved / "photos")
    assert [path.name for path in (moved / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert not first.equal(load_run(moved / "run").model.word_embeddings.weight)
    with pytest.raises(ValueError, match=r"step-00000003 has more steps than the 2 asked for"):
        go_on(moved, with_steps(2))


def test_tokenizers_take_more_steps_until_a_transformer_has_learned_their_codes(moved):
    assert len(go_on(moved, SETTINGS, TrainTokenizers)["reconstruction"]) == 2
    with pytest.raises(
        ValueError, match="has learned the codes of its image tokenizer as that is after 2 steps"
    ):
        go_on(moved, with_steps(3), TrainTokenizers)
    with pytest.raises(ValueError, match="has 2 steps; ask for at least as many, not 1"):
        go_on(moved, with_steps(1), TrainTokenizers)
    shutil.rmtree(moved / "run" / "checkpoints")
    assert len(go_on(moved, with_steps(3), TrainTokenizers)["reconstruction"]) == 3


@pytest.mark.parametrize(("kind", "steps"), [(TrainModel, 3), (TrainTokenizers, 2)])
def test_data_that_changed_are_refused_with_what_to_do(moved, kind, steps):
    captions = moved / "photos" / "captions.tsv"
    captions.write_text(captions.read_text().replace("number 3", "number three"))
    before = {path: path.read_bytes() for path in (moved / "run").glob("*.*")}
    with pytest.raises(ValueError) as caught:
        go_on(moved, with_steps(steps), kind)
    message = str(caught.value)
    assert f"not those that {moved / 'run'} was started with: put them back to go on" in message
    assert "train in another folder" in message
    after = {path: path.read_bytes() for path in before}
    assert {path.name for path in before if after[path] != before[path]} <= {"training.lock"}


def test_tokenizers_of_another_run_with_the_same_shapes_are_refused(moved):
    path = moved / "run" / "image_tokenizer.safetensors"
    save_tensors(path, {name: tensor + 1 for name, tensor in load_tensors(path).items()})
    for use in (lambda: load_run(moved / "run"), lambda: go_on(moved, with_steps(3))):
        with pytest.raises(
            ValueError, match="not those that its transformer was trained with: put them back"
        ):
            use()


def test_a_second_training_in_the_same_folder_is_refused(moved):
    with RunLock(moved / "run"):
        for kind in (TrainModel, TrainTokenizers):
            with pytest.raises(BlockingIOError, match="is being trained by process"):
                go_on(moved, with_steps(3), kind)
    go_on(moved, SETTINGS)


def test_all_options_are_in_the_run_folder_and_read_back(begun, tmp_path):
    words = ["--out", str(tmp_path)]
    given = parse("train-tokenizer", ["--settings", str(begun / "run" / "train-tokenizer.toml"), *words], "")
    assert given.image_tokenizer == SETTINGS.image_tokenizer
    assert given.image_tokenizer_train == SETTINGS.image_tokenizer_train
    assert (given.data, given.preset) == (str(begun / "photos"), "small")
    assert given.text_pieces == SETTINGS.text_pieces
    given = parse("train", ["--settings", str(begun / "run" / "train.toml"), *words], "")
    for name in ("model", "train", "sampling", "min_text_tokens", "max_text_tokens"):
        assert getattr(given, name) == getattr(SETTINGS, name)
    assert (given.data, given.preset, given.attention) == (str(begun / "photos"), "small", "dense")


def test_samples_are_of_texts_that_the_model_has_room_for(moved):
    asked = []

    def draw(model, tokenizers, settings, texts):
        assert not model.training
        asked.append(texts)
        raise OSError("seen enough")

    with pytest.raises(ValueError, match="sample_texts must have 1 to 30 tokens each, got 'word word"):
        go_on(moved, with_steps(4, samples_every=1, sample_texts=("word " * 40,)), draw=draw)
    for texts in (("a photo",), ()):
        with pytest.raises(OSError, match="seen enough"):
            go_on(moved, with_steps(4, samples_every=1, sample_texts=texts), draw=draw)
    assert asked == [("a photo",), tuple(f"a photo of thing number {index}" for index in range(4))]
