# SPDX-License-Identifier: Apache-2.0
"""One training in a run folder at a time."""

import errno
import fcntl
import os
import stat
import time

import pytest

from cogview.training.lock import LOCK, RunLock


def test_a_second_training_is_refused_and_told_which_the_first_is(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.take()
        with pytest.raises(BlockingIOError) as caught, RunLock(tmp_path):
            pass
        assert f"{tmp_path} is being trained by process {os.getpid()} on " in str(caught.value)
        assert "choose another folder" in str(caught.value)
    with RunLock(tmp_path):
        pass


def test_a_folder_is_made_only_when_it_is_taken(tmp_path):
    with RunLock(tmp_path / "run") as lock:
        assert not (tmp_path / "run").exists()
        lock.take()
        with pytest.raises(BlockingIOError), RunLock(tmp_path / "run"):
            pass
    assert stat.S_ISREG((tmp_path / "run" / LOCK).stat().st_mode)


def test_a_folder_from_which_no_weights_could_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--out must have a name in UTF-8, got .*; choose another"):
        RunLock(tmp_path / os.fsdecode(b"run \xff"))


def test_a_process_that_reads_ahead_does_not_hold_the_folder(tmp_path):
    reader, writer = os.pipe()
    with RunLock(tmp_path):
        child = os.fork()
        if not child:
            os.write(writer, b"x")
            time.sleep(30)
            os._exit(0)
        os.read(reader, 1)
    try:
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def fails(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.warns(UserWarning, match="has no locks: see to it yourself"), RunLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_to_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"run cannot be written to: Not a directory; train in a folder of your own"
    ):
        RunLock(tmp_path / "file" / "run").take()
