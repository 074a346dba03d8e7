# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from PIL import Image

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


def test_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="data folder not found"):
        open_pairs(str(tmp_path / "absent"))
