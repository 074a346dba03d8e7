# SPDX-License-Identifier: Apache-2.0
"""Rows on disk: their bytes, their split, and that no kill, thread or source changes them."""

import dataclasses
import errno
import fcntl
import io
import itertools
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import cogview.data.row_writer
from cogview.config import ImageTokenizerConfig
from cogview.data.digits import DigitPairs
from cogview.data.fingerprint import fingerprint
from cogview.data.folder import FolderPairs
from cogview.data.pairs import is_shards, open_pairs
from cogview.data.row_writer import has_rows, row_format, write_rows
from cogview.data.rows import KEY_BITS, Rows, RowSubset, open_rows, skipped_lines, split_rows
from cogview.data.samples import PairSamples
from cogview.data.webdataset import ShardSamples
from cogview.tokens.text_tokenizer import TextTokenizer
from cogview.tokens.tokenizers import Tokenizers
from cogview.tokens.vocab import Vocab
from cogview.tokens.vqvae import ImageTokenizer

SHAPE = ImageTokenizerConfig(num_codes=16, code_dim=8, channels=8, stages=2, image_size=8)
FILES = ("rows.bin", "images.bin", "rows.json", "skipped.tsv")


@pytest.fixture(scope="module")
def tokenizers():
    torch.manual_seed(0)
    text = TextTokenizer.train(["a photo of thing number 0123456789"] * 3, 30)
    return Tokenizers(text, ImageTokenizer(SHAPE).eval(), Vocab(16, len(text)), "these two")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(cogview.data.row_writer, "CHUNK", 2)
    monkeypatch.setattr(cogview.data.row_writer, "SAVE_EVERY", 0)


def write(samples, tokenizers, folder, *, width=9, **options):
    return write_rows(
        samples, tokenizers, folder, row_format(samples, tokenizers, width), progress=False, **options
    )


def content(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_rows_are_those_of_the_released_format(photos, tokenizers, tmp_path):
    captions = photos / "captions.tsv"
    captions.write_text(captions.read_text() + "\n2.png\t1 2\n")
    rows = write(PairSamples(FolderPairs(photos)), tokenizers, tmp_path / "rows")
    table = np.fromfile(tmp_path / "rows" / "rows.bin", np.int32).reshape(-1, 9 + 4)
    assert len(table) == 7 and len(rows) == 6
    for index in range(6):
        picture = FolderPairs(photos).image(index, 8)
        codes = tokenizers.image.encode(picture[None]).flatten().tolist()
        text = tokenizers.text.encode(f"a photo of thing number {index}")
        row = table[index if index < 3 else index + 1]
        assert row[9:].tolist() == codes
        padded = [piece + 16 for piece in text[:9]] + [-1] * (9 - len(text))
        assert row[:9].tolist() == padded[:9]
        assert rows.read(index) == (text[:9], codes)
    assert rows.read(2, 0.99) == (tokenizers.text.encode("1 2"), rows.read(2)[1])
    assert len(tokenizers.text.encode("a photo of thing number 2")) > 9
    assert rows.head.captions.longer_than(9) == 6 and rows.head.captions.count == 7


class Killed(Exception):
    pass


@pytest.mark.parametrize(("save_every", "moments"), [(0, 15), (1000, 9)])
def test_a_kill_at_any_moment_changes_nothing(photos, tokenizers, tmp_path, monkeypatch, save_every, moments):
    monkeypatch.setattr(cogview.data.row_writer, "SAVE_EVERY", save_every)
    (photos / "1.png").write_text("not an image")
    samples = PairSamples(FolderPairs(photos))
    write(samples, tokenizers, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    assert b"1.png" in expected["skipped.tsv"]
    names = ("write_json", "_add")
    real = {name: getattr(cogview.data.row_writer, name) for name in names}

    def killed_at(moment):
        """Dies at the call with that number, before it or, if the number is odd, after it."""
        calls = itertools.count()

        def dying(name):
            def call(*arguments):
                at = next(calls)
                if 2 * at == moment:
                    raise Killed
                real[name](*arguments)
                if 2 * at + 1 == moment:
                    raise Killed

            return call

        for name in names:
            monkeypatch.setattr(cogview.data.row_writer, name, dying(name))

    for moment in range(100):
        folder = tmp_path / str(moment)
        killed_at(moment)
        try:
            write(samples, tokenizers, folder, workers=1)
        except Killed:
            with (folder / "rows.bin").open("ab") as file:
                file.write(b"half a row")  # which a kill within a write leaves
            monkeypatch.undo()
            monkeypatch.setattr(cogview.data.row_writer, "CHUNK", 2)
            monkeypatch.setattr(cogview.data.row_writer, "SAVE_EVERY", save_every)
            finished = (folder / "rows.json").exists()
            if finished:
                break
            write(samples, tokenizers, folder, workers=3)
        assert content(folder) == expected
    assert moment == moments


def test_what_counts_is_on_the_disk(photos, tokenizers, tmp_path, monkeypatch):
    """A loss of power keeps of a file what was flushed; the state may never count more than that."""
    folder, kept, states = tmp_path / "rows", {}, []
    real_fsync, real_write = os.fsync, cogview.data.row_writer.write_json

    def fsync(descriptor):
        real_fsync(descriptor)
        kept[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def write_json(path, content):
        on_disk = {name: kept.get((folder / name).stat().st_ino, 0) for name in FILES if name != "rows.json"}
        if path.name == "writing.json":
            states.append(content)
            assert on_disk == {
                "rows.bin": 4 * 13 * content["rows"],
                "images.bin": 16 * content["images"],
                "skipped.tsv": content["skipped_bytes"],
            }
        real_write(path, content)

    (photos / "1.png").write_text("not an image")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(cogview.data.row_writer, "write_json", write_json)
    write(PairSamples(FolderPairs(photos)), tokenizers, folder)
    assert [state["images"] for state in states] == [1, 3, 5, 5]


@pytest.mark.parametrize("name", ["rows.bin", "images.bin", "skipped.tsv"])
def test_a_file_shorter_than_what_counts_is_told_and_written_anew(
    photos, tokenizers, tmp_path, monkeypatch, name
):
    """To lengthen it with zeros would give rows that were never made, with a digest that fits them."""
    (photos / "1.png").write_text("not an image")
    samples, folder = PairSamples(FolderPairs(photos)), tmp_path / "rows"
    write(samples, tokenizers, tmp_path / "whole")
    real, calls = cogview.data.row_writer._add, itertools.count()

    def dies(*arguments):
        if next(calls) == 2:
            raise Killed
        real(*arguments)

    monkeypatch.setattr(cogview.data.row_writer, "_add", dies)
    with pytest.raises(Killed):
        write(samples, tokenizers, folder)
    monkeypatch.setattr(cogview.data.row_writer, "_add", real)
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    with pytest.warns(UserWarning, match=rf"{name} is damaged: it has \d+ bytes where writing\.json counts"):
        write(samples, tokenizers, folder)
    assert content(folder) == content(tmp_path / "whole")


def test_other_data_or_tokenizers_are_refused_or_replace_what_is_there(photos, tokenizers, tmp_path):
    folder, samples = tmp_path / "rows", PairSamples(FolderPairs(photos))
    write(samples, tokenizers, folder)
    assert has_rows(folder, row_format(samples, tokenizers, 9))
    others = dataclasses.replace(tokenizers, fingerprint="others")
    with pytest.raises(ValueError, match=r"holds rows of other tokenizers; choose another folder"):
        write(samples, others, folder)
    (photos / "captions.tsv").write_text("0.png\tanother caption")
    changed = PairSamples(FolderPairs(photos))
    with pytest.raises(ValueError, match="holds rows of other data"):
        write(changed, tokenizers, folder)
    assert len(open_rows(folder)) == 6
    assert len(write(changed, tokenizers, folder, replace=True)) == 1


def test_two_writers_do_not_mix(photos, tokenizers, tmp_path):
    samples = PairSamples(FolderPairs(photos))
    tmp_path.joinpath("rows").mkdir()
    first = cogview.data.row_writer._Files(tmp_path / "rows")
    with pytest.raises(BlockingIOError, match="another process is writing rows"):
        write(samples, tokenizers, tmp_path / "rows")
    first.close()
    assert len(write(samples, tokenizers, tmp_path / "rows")) == 6


def test_a_lock_that_fails_is_told_and_one_that_is_not_there_is_a_warning(
    photos, tokenizers, tmp_path, monkeypatch
):
    number = errno.EIO

    def fails(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(OSError, match="Input/output error"):
        write(PairSamples(FolderPairs(photos)), tokenizers, tmp_path / "rows")
    number = errno.ENOLCK
    with pytest.warns(UserWarning, match="rows has no locks: see to it yourself"):
        write(PairSamples(FolderPairs(photos)), tokenizers, tmp_path / "rows")


def test_damaged_or_unfinished_rows_are_one_clear_error(photos, tokenizers, tmp_path):
    with pytest.raises(FileNotFoundError, match="are not there: write them with cogview tokenize"):
        open_rows(tmp_path)
    folder = tmp_path / "rows"
    write(PairSamples(FolderPairs(photos)), tokenizers, folder)
    (folder / "rows.bin").write_bytes(b"1234")
    with pytest.raises(
        ValueError, match=r"rows\.bin must have 312 bytes, has 4; remove the folder .*rows, and the same"
    ):
        open_rows(folder)
    (folder / "rows.json").write_text("{}")
    with pytest.raises(ValueError, match=r"rows\.json is damaged"):
        open_rows(folder)
    (folder / "rows.json").unlink()
    with pytest.raises(FileNotFoundError, match="are not finished"):
        open_rows(folder)


@pytest.mark.parametrize(("place", "number"), [(0, 0), (0, -2), (0, 10**6), (-1, -1), (-1, 10**6)])
def test_what_is_no_token_is_refused_by_file(photos, tokenizers, tmp_path, monkeypatch, place, number):
    folder = tmp_path / "rows"
    monkeypatch.setattr(cogview.data.row_writer, "CHECKED_BYTES", 0)  # as of rows that are too many to check
    rows = write(PairSamples(FolderPairs(photos)), tokenizers, folder)
    tokens = np.fromfile(folder / "rows.bin", np.int32).reshape(len(rows._tokens), -1)
    tokens[1, place] = number
    tokens.tofile(folder / "rows.bin")
    with pytest.raises(ValueError, match=r"rows\.bin are damaged: a row of image \d holds what is no token"):
        for image in range(len(rows)):
            for choice in (0.0, 0.99):
                open_rows(folder).read(image, choice)


@pytest.mark.parametrize("name", ["rows.bin", "images.bin"])
def test_rows_that_changed_since_they_were_written_are_refused(photos, tokenizers, tmp_path, name):
    """Zeros are tokens too: without a digest they would be trained on."""
    folder = tmp_path / "rows"
    write(PairSamples(FolderPairs(photos)), tokenizers, folder)
    damaged = bytearray((folder / name).read_bytes())
    damaged[-8:] = bytes(8)
    (folder / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{name} is not as it was written; remove the folder .*rows, and"):
        open_rows(folder)


def test_rows_of_before_there_were_digests_are_opened(photos, tokenizers, tmp_path):
    folder = tmp_path / "rows"
    write(PairSamples(FolderPairs(photos)), tokenizers, folder)
    head = json.loads((folder / "rows.json").read_text())
    assert len(head.pop("digests")) == 2
    (folder / "rows.json").write_text(json.dumps(head))
    assert len(open_rows(folder)) == 6


def test_pictures_that_are_all_bad_are_an_error(tmp_path, tokenizers):
    (tmp_path / "a.png").write_text("not an image")
    (tmp_path / "captions.tsv").write_text("a.png\tx\n")
    with pytest.raises(ValueError, match=r"no picture could be read; .*skipped\.tsv says why"):
        write(PairSamples(FolderPairs(tmp_path)), tokenizers, tmp_path / "rows")


def test_rows_go_to_another_process_by_their_path(photos, tokenizers, tmp_path):
    rows = write(PairSamples(FolderPairs(photos)), tokenizers, tmp_path / "rows")
    pickled = pickle.dumps(RowSubset(rows, np.array([1]), others=True))
    assert len(pickled) < 2000 and rows._tokens.nbytes < 2000
    assert pickle.loads(pickled).read(1) == rows.read(2)
    assert b"rows.bin" not in pickled and rows._tokens.tobytes() not in pickled


def test_the_fingerprint_of_rows_is_that_of_their_content(photos, tokenizers, tmp_path):
    samples = PairSamples(FolderPairs(photos))
    first, second = (fingerprint(write(samples, tokenizers, tmp_path / name)) for name in "ab")
    assert first == second != fingerprint(write(samples, tokenizers, tmp_path / "c", width=5))


def test_a_split_is_disjoint_whole_and_stable_when_data_are_added():
    codes = torch.arange(2000).view(500, 4)
    rows = Rows.in_memory(Vocab(2000, 20), codes, [[[1]]] * 500)
    training, validation = split_rows(rows, 0.1)
    assert len(validation) > 0 and len(training) + len(validation) == 500
    seen = [tuple(part.read(index)[1]) for part in (training, validation) for index in range(len(part))]
    assert sorted(seen) == sorted(map(tuple, codes.tolist()))
    some = Rows.in_memory(Vocab(2000, 20), codes[:400], [[[1]]] * 400).chosen(0.1)
    assert np.array_equal(some, [image for image in rows.chosen(0.1) if image < 400])
    assert 20 < len(validation) < 80
    assert split_rows(rows, 0.0) == (rows, None)
    with pytest.raises(ValueError, match=r"validation=0\.5 takes . of 1 images; take another share"):
        split_rows(Rows.in_memory(Vocab(2000, 20), codes[:1], [[[1]]]), 0.5)


def test_the_side_of_an_image_follows_from_its_codes_and_copies_stay_together(tokenizers, tmp_path):
    class Few(DigitPairs):
        def __len__(self):
            return self.few

    some, more = Few("test", copies=4), Few("test", copies=4)
    some.few, more.few = 80, 120
    keys = [
        write(PairSamples(pairs), tokenizers, tmp_path / name)._images[:, 1]
        for name, pairs in {"some": some, "more": more}.items()
    ]
    assert np.array_equal(keys[1][:80], keys[0])
    assert np.array_equal(keys[0][::4], keys[0][3::4]) and len(set(keys[0].tolist())) == 20
    assert 0.3 < keys[1].mean() / 2**KEY_BITS < 0.7


def shard(path, samples):
    """A tar file of ``{name: bytes}``."""
    with tarfile.open(path, "w") as file:
        for name, data in samples.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))


def png(value):
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "png")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        samples = {}
        for index in range(3):
            value = 25 * (3 * number + index)
            samples[f"{index}.png"] = png(value)
            samples[f"{index}.txt"] = f"thing number {value}".encode()
        shard(folder / f"part-{number}.tar", samples)
    return folder


def test_shards_give_their_rows_in_order_however_they_are_read(shards, tokenizers, tmp_path, monkeypatch):
    pattern = f"{shards}/part-{{0..2}}.tar"
    assert is_shards(pattern) and not is_shards(shards)
    with pytest.raises(ValueError, match="names shards, which cogview tokenize turns into rows"):
        open_pairs(pattern)
    write(ShardSamples(pattern), tokenizers, tmp_path / "whole", workers=3)
    rows = open_rows(tmp_path / "whole")
    assert [tokenizers.text.decode(rows.read(index)[0]) for index in range(2)] == [
        tokenizers.text.decode(tokenizers.text.encode(f"thing number {25 * index}")[:9]) for index in range(2)
    ]
    assert len(rows) == 9
    real = cogview.data.row_writer._add
    for kill in range(6):
        calls = itertools.count()

        def dies(*arguments, kill=kill, calls=calls):
            if next(calls) == kill:
                raise Killed
            real(*arguments)

        monkeypatch.setattr(cogview.data.row_writer, "_add", dies)
        with pytest.raises(Killed):
            write(ShardSamples(pattern), tokenizers, tmp_path / str(kill))
        monkeypatch.setattr(cogview.data.row_writer, "_add", real)
        write(ShardSamples(pattern), tokenizers, tmp_path / str(kill), workers=1)
        assert content(tmp_path / str(kill)) == content(tmp_path / "whole")


def test_commands_that_write_shards(shards, tokenizers, tmp_path):
    # Behind the end of the tar is more than a pipe holds: that nobody reads it is no failure of the command.
    pattern = f"pipe:cat {shards}/part-{{0..2}}.tar && head -c 400000 /dev/zero"
    rows = write(ShardSamples(pattern), tokenizers, tmp_path / "rows")
    write(ShardSamples(f"{shards}/part-{{0..2}}.tar"), tokenizers, tmp_path / "files")
    assert len(rows) == 9
    assert content(tmp_path / "files")["rows.bin"] == content(tmp_path / "rows")["rows.bin"]
    failing = ShardSamples(f"pipe:head -c 3000 {shards}/part-0.tar; exit 3")
    with pytest.raises(OSError, match=r"^pipe:.* failed: .*; repeat the command to go on from there"):
        write(failing, tokenizers, tmp_path / "failing")


def test_a_name_that_is_no_text_is_one_line_of_what_was_left_out():
    assert (
        skipped_lines([("a\tb\nc", "bad"), ("\udcff\ud800", "bad")]) == b"a b c\tbad\n\\udcff\\ud800\tbad\n"
    )


@pytest.mark.parametrize("size", [2048, 2700], ids=["between entries", "within one"])
def test_what_is_wrong_in_a_shard_is_listed_and_the_rest_used(shards, tokenizers, tmp_path, size):
    shard(
        shards / "part-1.tar",
        {
            "good.png": png(9),
            "good.json": json.dumps({"caption": ["one", "two"], "width": 8}).encode(),
            "silent.png": png(8),
            "blind.txt": b"no picture",
            "broken.jpg": b"not an image",
            "broken.txt": b"x",
            "odd.png": png(7),
            "odd.json": b"[1]",
            "deep.png": png(6),
            "deep.json": b"[" * 100_000,
            "latin.png": png(5),
            "latin.txt": b"caf\xe9",
            "half.png": png(4),
            "half.json": b'{"caption": "\\ud800"}',
            "line\nend.jpg": b"not an image",
            "line\nend.txt": b"x",
        },
    )
    cut = (shards / "part-2.tar").read_bytes()
    (shards / "part-2.tar").write_bytes(cut[:size])
    rows = write(ShardSamples(f"{shards}/part-{{1..2}}.tar"), tokenizers, tmp_path / "rows")
    reasons = (tmp_path / "rows" / "skipped.tsv").read_text()
    for name in (
        "silent has no caption",
        "blind has no picture",
        "broken cannot be read",
        "odd has no caption",
        "deep has no caption",
        "latin has no caption in UTF-8",
        "half has no caption",
        "line end\t",
    ):
        assert name in reasons
    assert "part-2.tar\tthe rest of the shard cannot be read: " in reasons
    assert (len(rows), rows.head.rows, rows.head.skipped) == (2, 3, 9)
    with pytest.raises(FileNotFoundError, match=r"1 of 4 shards are not there: .*part-3\.tar"):
        ShardSamples(f"{shards}/part-{{0..3}}.tar")
