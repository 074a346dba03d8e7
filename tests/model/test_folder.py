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
        ("captions.tsv", "blue thing " * 30 + "\tblue.png\n", "names files that are not there: blue thing"),
        ("captions.json", "{", "is not valid JSON"),
        ("captions.json", "[" * 100_000, "is not valid JSON"),
        ("captions.json", '{"a": ' + "1" * 5000 + "}", "is not valid JSON"),
        ("captions.json", "[1]", "must hold"),
        ("captions.json", '{"red.png": []}', "red.png must have a caption"),
    ],
)
def test_a_bad_folder_is_one_clear_error(folder, file, content, message):
    if file:
        (folder / file).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        FolderPairs(folder)


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\v", "\f", "\x1c"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_only_line_ends_end_a_caption(folder, separator, line_end):
    text = f"gray.png\tone{separator}red.png\ttwo{line_end}red.png\tthree{line_end}"
    (folder / "captions.tsv").write_bytes(text.encode())
    pairs = FolderPairs(folder)
    assert pairs.captions(0) == [f"one{separator}red.png\ttwo"]
    assert pairs.captions(1) == ["three"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(folder, encoding):
    (folder / "captions.tsv").write_bytes("gray.png\t灰色\n".encode(encoding))
    assert FolderPairs(folder).captions(0) == ["灰色"]


@pytest.mark.parametrize(
    ("encoding", "line", "conversion"),
    [
        ("gbk", "line 2", "iconv -f GB18030 -t UTF-8"),
        ("utf-16-le", "zero bytes", "iconv -f UTF-16LE -t UTF-8"),
        ("utf-16-be", "zero bytes", "iconv -f UTF-16BE -t UTF-8"),
    ],
)
@pytest.mark.parametrize("file", ["captions.tsv", "captions.json"])
def test_another_encoding_is_named_with_the_way_out(folder, encoding, line, conversion, file):
    text = {"captions.tsv": "red.png\tred\ngray.png\t{}", "captions.json": '{{"red.png":\n"{}"}}'}[file]
    (folder / file).write_bytes(text.format("灰色" if encoding == "gbk" else "gray").encode(encoding))
    with pytest.raises(ValueError) as raised:
        FolderPairs(folder)
    message = str(raised.value)
    assert str(folder / file) in message and line in message and conversion in message


def test_a_zero_byte_alone_is_no_other_encoding(folder):
    """A conversion would succeed and give garbage."""
    (folder / "captions.tsv").write_bytes(b"red.png\tred\ngray.png\tgr\0ay\n")
    with pytest.raises(ValueError, match=r"captions.tsv is damaged: line 2 holds a zero byte; take it out"):
        FolderPairs(folder)


def test_a_conversion_keeps_the_original(folder):
    (folder / "captions.tsv").write_bytes(("red.png\t" + "红" * 200 + "\n").encode("utf-16-le"))
    with pytest.raises(ValueError) as raised:
        FolderPairs(folder)
    old = folder / "captions.tsv"
    assert str(raised.value).endswith(f"&& mv {old} {old}.before && mv {old}.utf8 {old}")


def test_a_file_that_json_names_twice_has_both_captions(folder):
    (folder / "captions.json").write_text('{"red.png": "one", "gray.png": "x", "red.png": ["two", "three"]}')
    assert FolderPairs(folder).captions(1) == ["one", "two", "three"]


def test_half_a_character_is_an_error_and_not_a_crash_later(folder):
    (folder / "captions.json").write_text('{"red.png": "red \\ud83d"}')
    with pytest.raises(ValueError, match=r"red\.png must have a caption"):
        FolderPairs(folder)


def test_names_that_nearly_match_get_a_hint(folder):
    (folder / "caf\u00e9").mkdir()
    save(folder / "caf\u00e9" / "Tea.png", np.zeros((8, 8)))
    (folder / "captions.tsv").write_text("cafe\u0301\\tea.PNG\tx\n./RED.png\tx\nnone.png\tx\n")
    with pytest.raises(FileNotFoundError) as raised:
        FolderPairs(folder)
    message = str(raised.value)
    assert (
        "(did you mean 'caf\u00e9/Tea.png'?)" in message and "./RED.png (did you mean 'red.png'?)" in message
    )
    assert message.endswith("none.png")


def test_a_link_to_nothing_is_not_there(folder):
    (folder / "link.png").symlink_to(folder / "absent.png")
    (folder / "captions.tsv").write_text("link.png\tx\n")
    with pytest.raises(FileNotFoundError, match=r"names files that are not there: link\.png$"):
        FolderPairs(folder)


def test_bad_images_can_be_left_out_and_are_told(folder):
    (folder / "text.png").write_text("not an image")
    (folder / "captions.tsv").write_text("absent.png\tx\ngray.png\tgray\nred.png\tred\ntext.png\tx\n")
    pairs = open_pairs(folder, skip_bad=True)
    left_out = pairs.check(8, skip_bad=True, progress=False)
    assert [line.partition(".png")[0].rpartition("/")[2] for line in left_out] == ["absent", "text"]
    assert [pairs.name(index) for index in range(len(pairs))] == ["gray.png", "red.png"]
    torch.testing.assert_close(pairs.image(1, 8)[:, 3, 3], torch.tensor([1.0, 0.0, 0.0]))


def test_when_no_image_is_good_none_is_left_out(folder):
    (folder / "text.png").write_text("not an image")
    (folder / "captions.tsv").write_text("text.png\tx\n")
    with pytest.raises(ValueError, match="1 of 1 images"):
        FolderPairs(folder).check(8, skip_bad=True, progress=False)


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
