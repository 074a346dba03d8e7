# SPDX-License-Identifier: Apache-2.0
import os
import shutil

import pytest

from cogview.data.digits import DigitPairs
from cogview.data.fingerprint import fingerprint
from cogview.data.folder import FolderPairs


def test_a_folder_that_was_moved_or_touched_is_the_same(photos, tmp_path):
    before = fingerprint(FolderPairs(photos))
    os.utime(photos / "0.png", (1, 1))
    (photos / "notes.txt").write_text("not listed")
    shutil.move(photos, tmp_path / "moved")
    assert fingerprint(FolderPairs(tmp_path / "moved")) == before


@pytest.mark.parametrize("change", ["caption", "name", "size", "more"])
def test_a_folder_that_changed_is_another(photos, change):
    before, captions = fingerprint(FolderPairs(photos)), photos / "captions.tsv"
    if change == "caption":
        captions.write_text(captions.read_text().replace("number 3", "number three"))
    elif change == "name":
        (photos / "0.png").rename(photos / "zero.png")
        captions.write_text(captions.read_text().replace("0.png", "zero.png"))
    elif change == "size":
        with (photos / "0.png").open("ab") as file:
            file.write(b"\0")
    else:
        captions.write_text(captions.read_text() + "\n5.png\tanother caption")
    assert fingerprint(FolderPairs(photos)) != before


def test_digits_differ_by_split_and_copies():
    kinds = [DigitPairs("test"), DigitPairs("test", copies=2), DigitPairs("train", copies=1)]
    assert len({fingerprint(pairs) for pairs in kinds}) == 3
    assert fingerprint(DigitPairs("test")) == fingerprint(kinds[0])
