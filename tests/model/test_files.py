# SPDX-License-Identifier: Apache-2.0
import errno
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cogview.files
from cogview.files import (
    ASIDE,
    digest,
    folder_written_aside,
    load_tensors,
    read_json,
    require_folder,
    require_new,
    save_tensors,
    write_json,
    written_aside,
)
from cogview.parsing import tomllib
from cogview.settings import write_options
from cogview.tokens.text_tokenizer import TextTokenizer
from cogview.weights.lazy import open_safetensors
from cogview.weights.pickles import read_pickle


def test_a_damaged_file_is_one_clear_error(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(100)})
    content = (tmp_path / "x.safetensors").read_bytes()
    for damaged in (b"", content[:50], content[:-10], b"\xff" * 40):
        (tmp_path / "x.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.safetensors is not a safetensors file, or is damaged"):
            load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="weights not found"):
        load_tensors(tmp_path / "absent")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_json(tmp_path / "x.json")
    for damaged in ("[" * 100_000, "1" * 5000, '{"format_version": true}'):
        (tmp_path / "x.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"x\.json is damaged"):
            read_json(tmp_path / "x.json")


def test_a_pipe_that_nobody_writes_to_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_json, load_tensors):
        with pytest.raises(FileNotFoundError, match=r"not found: .*pipe"):
            read(tmp_path / "pipe")


def test_a_name_that_nothing_can_have_is_that_of_no_file(tmp_path):
    os.symlink("loop", tmp_path / "loop")
    for path in (tmp_path / "loop" / "x", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        assert not cogview.files.exists(path)
        with pytest.raises(FileNotFoundError, match="file not found: "):
            read_json(path)


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*x\.png'"),
        written_aside(tmp_path / "x.png"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A rename may outlive a loss of power that the files do not."""
    done, real_fsync, real_rename = [], os.fsync, os.rename

    def fsync(descriptor):
        real_fsync(descriptor)
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))

    def rename(old, new):
        real_rename(old, new)
        done.append("renamed")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with folder_written_aside(tmp_path / "x") as aside:
        (aside / "part").mkdir()
        for path in (aside / "a", aside / "part" / "b"):
            path.write_text("content")
    name = aside.name
    assert sorted(done[:-2]) == [name, f"{name}/a", f"{name}/part", f"{name}/part/b"]
    assert done[-2:] == ["renamed", "."]


def test_what_a_user_may_not_read_is_called_so_and_not_damaged(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    write_json(tmp_path / "x.json", {})
    torch.save({}, tmp_path / "x.pt")
    (tmp_path / "x.model").write_bytes(b"pieces")
    for path in tmp_path.iterdir():
        path.chmod(0)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        for read, name in (
            (load_tensors, "x.safetensors"),
            (open_safetensors, "x.safetensors"),
            (read_json, "x.json"),
            (read_pickle, "x.pt"),
            (TextTokenizer.load, "x.model"),
        ):
            with pytest.raises(
                PermissionError, match=rf"{name} cannot be read: permission denied; ask .*, its owner"
            ):
                read(tmp_path / name)
    finally:
        if was_root:
            os.seteuid(0)


def test_json_files_have_a_version_and_a_newer_one_is_refused(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"format_version": 1, "a": 1}
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_text('{"format_version": 2, "a": 1}')
    with pytest.raises(
        ValueError, match=r"newer version of cogview: its format is 2, this version reads up to 1"
    ):
        read_json(path)
    path.write_text('{"format_version": "new"}')
    with pytest.raises(ValueError, match="format_version must be a whole number, got 'new'"):
        read_json(path)


def test_names_that_are_no_utf8_go_into_files_and_come_back(tmp_path):
    content = {"data": os.fsdecode(b"photos \xff"), "n": 1}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    (tmp_path / "a.json").read_text(encoding="utf-8")
    write_options(tmp_path / "a.toml", content)
    assert tomllib.loads((tmp_path / "a.toml").read_text(encoding="utf-8")) == {"data": "photos ?", "n": 1}


def test_a_digest_tells_any_two_contents_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("cogview.files._CHUNK_BYTES", 4)
    contents = (b"", b"abcd", b"abcdefgh", b"efghabcd", b"abcdefg", b"abcdefghi", b"abcdefgh\0")
    found = []
    for content in contents:
        (tmp_path / "x").write_bytes(content)
        found.append(digest(tmp_path / "x"))
    assert len(set(found)) == len(contents)


@pytest.mark.parametrize("written", [written_aside, folder_written_aside])
def test_a_second_writer_is_refused_and_takes_nothing_from_the_first(tmp_path, written):
    def fill(aside, content):
        (aside / "part" if aside.is_dir() else aside).write_text(content)

    with written(tmp_path / "x") as aside:
        fill(aside, "first")
        with pytest.raises(BlockingIOError, match=r"another process is writing .*/x; wait until it ends"):
            written(tmp_path / "x").__enter__()
    with written(tmp_path / "y") as aside:
        fill(aside, "next")
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]
    assert (tmp_path / "x" / "part" if (tmp_path / "x").is_dir() else tmp_path / "x").read_text() == "first"


def test_what_a_killed_writer_has_left_is_removed(tmp_path):
    (tmp_path / f"x{ASIDE}").write_text("half, and longer than the next")
    (tmp_path / f"y{ASIDE}").mkdir()
    (tmp_path / f"y{ASIDE}" / "half").write_text("")
    write_json(tmp_path / "x", {})
    with folder_written_aside(tmp_path / "y") as aside:
        (aside / "whole").write_text("")
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]
    assert os.listdir(tmp_path / "y") == ["whole"] and read_json(tmp_path / "x") == {}


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    (tmp_path / "x").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"x exists; choose another folder"):
        folder_written_aside(tmp_path / "x").__enter__()
    assert os.listdir(tmp_path) == ["x"]


def test_many_writers_at_once_give_one_whole_folder(tmp_path):
    def write(number):
        try:
            with folder_written_aside(tmp_path / "x") as aside:
                for part in range(20):
                    (aside / f"{part}").write_text(str(number))
        except (BlockingIOError, FileExistsError):
            return 0
        return 1

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(write, range(40))) == 1
    assert os.listdir(tmp_path) == ["x"]
    assert len(os.listdir(tmp_path / "x")) == 20
    assert len({path.read_text() for path in (tmp_path / "x").iterdir()}) == 1


def test_a_place_that_takes_no_folder_is_told_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir(tmp_path))
    for require in (require_folder, require_new):
        for name in ("file/x", "link/x", "loop/x", "x" * 250, "x" * 1000, "deep/" + "x" * 250 + "/x"):
            with pytest.raises((OSError, ValueError), match=r"^--out ") as caught:
                require(tmp_path / name)
            assert caught.value.args[0].startswith("--out ")
        require(tmp_path / "new" / "deep")
    for name in ("file", "link", "loop"):
        with pytest.raises(OSError, match=r"--out .* cannot be written: .* is "):
            require_folder(tmp_path / name)
        with pytest.raises(FileExistsError, match=r"exists; name another, or remove it"):
            require_new(tmp_path / name)
    require_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_that_still_takes_a_name_is_found_before_any_work(tmp_path, monkeypatch):
    class FullDisk(io.BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cogview.files.tempfile, "TemporaryFile", lambda **_: FullDisk())
    with pytest.raises(OSError, match=r"--out .*out cannot be written: .* \(No space left on device\)"):
        require_folder(tmp_path / "out")
