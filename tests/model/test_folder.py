# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from PIL import Image

import cogview.data.folder
from cogview.data.folder import FolderPairs
from cogview.data.pairs import open_pairs


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


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, None, "has no captions.tsv"),
        ("captions.tsv", "red.png a red thing\n", r"captions.tsv, line 1: expected file<TAB>caption"),
        ("captions.tsv", "", "the caption list is empty"),
        ("captions.tsv", "blue.png\tblue\n", r"names files that are not there: blue\.png"),
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


def test_all_absent_files_are_listed(folder):
    (folder / "captions.tsv").write_text("".join(f"{index}.png\tx\n" for index in range(25)))
    with pytest.raises(FileNotFoundError) as raised:
        FolderPairs(folder)
    assert str(raised.value).count(".png") == 20
    assert str(raised.value).endswith("; and 5 more")


def test_every_bad_image_is_found_at_once(folder, capsys):
    (folder / "text.png").write_text("not an image")
    save(folder / "cut.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3)))
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:3000])
    names = ("text.png", "red.png", "cut.png", "gray.png")
    (folder / "captions.tsv").write_text("".join(f"{name}\tx\n" for name in names))
    with pytest.raises(ValueError) as raised:
        FolderPairs(folder).check(8)
    message = str(raised.value)
    assert f"2 of 4 images in {folder} cannot be used" in message
    assert "text.png cannot be read" in message and "cut.png cannot be read" in message
    assert "red.png" not in message and "gray.png" not in message
    assert "check images: image" in capsys.readouterr().err


def test_an_image_is_read_once_as_long_as_there_is_room(folder, monkeypatch):
    (folder / "captions.tsv").write_text("red.png\tred\ngray.png\tgray\n")
    monkeypatch.setattr(cogview.data.folder, "CACHE_BYTES", 3 * 8 * 8)
    pairs = FolderPairs(folder)
    pairs.check(8, progress=False)
    first = [pairs.image(index, 8) for index in range(2)]
    kept = list(pairs._pictures)
    assert len(kept) == 1
    for name in ("red.png", "gray.png"):
        (folder / name).unlink()
    assert torch.equal(pairs.image(kept[0][0], 8), first[kept[0][0]])
    with pytest.raises(FileNotFoundError, match="image not found"):
        pairs.image(1 - kept[0][0], 8)
    with pytest.raises(FileNotFoundError, match="image not found"):
        pairs.image(kept[0][0], 16)


def test_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="data folder not found"):
        open_pairs(str(tmp_path / "absent"))
