# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.data.digits import TRAINING_PHRASINGS, DigitPairs
from cogview.data.pairs import FolderPairs, TokenDataset, batch_indices, open_pairs, read_image
from cogview.tokens.vocab import Vocab


def save(path, array):
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "red.png", np.full((20, 30, 3), (255, 0, 0)))
    save(tmp_path / "gray.png", np.full((16, 16), 51))
    return tmp_path


def test_tsv_captions(folder):
    (folder / "captions.tsv").write_text(
        "red.png\ta red thing\n\ngray.png\tgray\nred.png\t红色\n", encoding="utf-8"
    )
    pairs = FolderPairs(folder)
    assert len(pairs) == 2
    assert pairs.captions(0) == ["gray"]
    assert pairs.captions(1) == ["a red thing", "红色"]
    assert pairs.image(1, 8).shape == (3, 8, 8)
    torch.testing.assert_close(pairs.image(1, 8)[:, 3, 3], torch.tensor([1.0, 0.0, 0.0]))


def test_json_captions(folder):
    (folder / "captions.json").write_text(json.dumps({"red.png": "red", "gray.png": ["a", "b"]}))
    pairs = FolderPairs(folder)
    assert [pairs.captions(index) for index in range(2)] == [["a", "b"], ["red"]]


def test_images_of_every_kind_become_rgb(tmp_path):
    save(tmp_path / "gray.png", np.full((16, 16), 51))
    torch.testing.assert_close(read_image(tmp_path / "gray.png", 8), torch.full((3, 8, 8), 0.2))
    # Half-transparent black on white.
    save(tmp_path / "alpha.png", np.dstack([np.zeros((8, 8, 3)), np.full((8, 8), 51)]))
    torch.testing.assert_close(read_image(tmp_path / "alpha.png", 8), torch.full((3, 8, 8), 0.8))


def test_the_centre_is_kept(tmp_path):
    wide = np.zeros((8, 24, 3))
    wide[:, 8:16] = 255
    save(tmp_path / "wide.png", wide)
    assert torch.all(read_image(tmp_path / "wide.png", 8) == 1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, None, "has no captions.tsv"),
        ("captions.tsv", "red.png a red thing\n", r"captions.tsv, line 1: expected file<TAB>caption"),
        ("captions.tsv", "", "the caption list is empty"),
        ("captions.tsv", "blue.png\tblue\n", "names blue.png, which is not there"),
        ("captions.json", "{", "is not valid JSON"),
        ("captions.json", "[1]", "must hold"),
        ("captions.json", '{"red.png": []}', "red.png must have a caption"),
    ],
)
def test_a_bad_folder_is_one_clear_error(folder, file, content, message):
    if file:
        (folder / file).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        FolderPairs(folder)


def test_a_missing_folder_or_a_bad_image_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="data folder not found"):
        open_pairs(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="image not found"):
        read_image(tmp_path / "absent.png", 8)
    (tmp_path / "bad.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        read_image(tmp_path / "bad.png", 8)
    save(tmp_path / "cut.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3)))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as an image"):
        read_image(tmp_path / "cut.png", 8)


def test_every_epoch_visits_every_item_once():
    visited = [index for step in range(14) for index in batch_indices(3, step, 5, 7)]
    for epoch in range(10):
        assert sorted(visited[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert visited[:7] != visited[7:14]


def test_batches_follow_from_seed_and_step():
    vocab = Vocab(16, 20)
    dataset = TokenDataset(vocab, torch.arange(40).view(10, 4) % 16, [[[1], [2, 3]]] * 10, length=11)
    options = {"text_weight": 2.0, "caption_fraction": 0.5, "seed": 1}
    batch = dataset.batch(4, 64, **options)
    assert torch.equal(batch.tokens, dataset.batch(4, 64, **options).tokens)
    assert not torch.equal(batch.tokens, dataset.batch(5, 64, **options).tokens)
    first = batch.tokens[:, 0]
    is_caption = first == vocab.command("TINY")
    assert torch.all(is_caption | (first == vocab.command("ROI1")))
    assert 16 < is_caption.sum() < 48
    only = dataset.batch(4, 64, text_weight=1.0, caption_fraction=0.0, seed=1).tokens[:, 0]
    assert torch.all(only == vocab.command("ROI1"))


def test_rows_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="longest text of 3 tokens"):
        TokenDataset(Vocab(16, 20), torch.zeros(1, 4, dtype=torch.int64), [[[1, 2, 3]]], length=11)


def test_digits_are_split_and_the_test_scans_are_no_training_scans():
    train, test = DigitPairs("train"), DigitPairs("test")
    assert (len(train), len(test)) == (1437, 360)
    seen = {tuple(train.image(index, 8)[0].flatten().tolist()) for index in range(len(train))}
    assert not any(tuple(test.image(index, 8)[0].flatten().tolist()) in seen for index in range(len(test)))
    assert len(train.captions(0)) == len(TRAINING_PHRASINGS)
    assert torch.equal(DigitPairs("test").labels, test.labels)


def test_copies_are_near_their_scan_and_keep_its_label():
    plain, copies = DigitPairs("train"), DigitPairs("train", copies=3)
    assert len(copies) == 3 * len(plain)
    for index in (0, 7, 500):
        assert torch.equal(copies.image(3 * index, 16), plain.image(index, 16))
        assert copies.labels[3 * index + 2] == plain.labels[index]
        change = (copies.image(3 * index + 1, 8) - plain.image(index, 8)).abs().mean()
        assert 0 < change < 0.25
