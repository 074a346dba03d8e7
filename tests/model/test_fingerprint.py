# SPDX-License-Identifier: Apache-2.0
import io
import os
import shutil
import tarfile

import pytest
from PIL import Image

import cogview.data.fingerprint
from cogview.data.digits import DigitPairs
from cogview.data.fingerprint import contents, fingerprint
from cogview.data.folder import FolderPairs
from cogview.data.webdataset import ShardSamples


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


@pytest.mark.parametrize("suffix", ["bmp", "tar"])
def test_other_contents_of_the_same_size_are_other_data(tmp_path, suffix):
    """Pictures that were not compressed, and shards, which are padded, have sizes in common."""

    def data(place, value):
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        for index in range(3):
            color = (value, 0, 0) if index == place else (0, 0, 0)
            Image.new("RGB", (8, 8), color).save(folder / f"{index}.bmp")
        (folder / "captions.tsv").write_text("".join(f"{i}.bmp\tpicture {i}\n" for i in range(3)))
        if suffix == "bmp":
            return FolderPairs(folder)
        with tarfile.open(tmp_path / "photos.tar", "w") as shard:
            for index in range(3):
                shard.add(folder / f"{index}.bmp", f"{index}.bmp", filter=undated)
                text = tarfile.TarInfo(f"{index}.txt")
                text.size = 1
                shard.addfile(text, io.BytesIO(b"x"))
        return ShardSamples(str(tmp_path / "photos.tar"))

    def undated(entry):
        entry.mtime = 0
        return entry

    found = [fingerprint(data(place, 9)) for place in (0, 1, 2)]
    assert len(set(found)) == 3 and fingerprint(data(2, 9)) == found[2]


def test_of_many_files_and_of_large_ones_parts_are_read(tmp_path, monkeypatch):
    for name, value in (("MANY_FILES", 5), ("BLOCK", 4), ("MANY_BLOCKS", 3)):
        monkeypatch.setattr(cogview.data.fingerprint, name, value)
    paths = [tmp_path / str(index) for index in range(11)]
    for path in paths:
        path.write_bytes(bytes(40))
    before = list(contents(paths))
    assert len(before) == 5
    changed = []
    for place in range(10):  # which block is read of the first file, and of the last
        (tmp_path / "0").write_bytes(bytes(4 * place) + b"changed"[:4] + bytes(36 - 4 * place))
        changed.append(list(contents(paths)) != before)
    assert [place for place, one in enumerate(changed) if one] == [0, 4, 9]
    assert list(contents([])) == []


def test_digits_differ_by_split_and_copies():
    kinds = [DigitPairs("test"), DigitPairs("test", copies=2), DigitPairs("train", copies=1)]
    assert len({fingerprint(pairs) for pairs in kinds}) == 3
    assert fingerprint(DigitPairs("test")) == fingerprint(kinds[0])
