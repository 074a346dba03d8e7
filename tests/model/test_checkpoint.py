# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint keeps, what it refuses, and what beside it is left alone."""

import json
import os
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch

from cogview.config import TrainConfig
from cogview.training.checkpoint import CheckpointState, latest_checkpoint, load_checkpoint, save_checkpoint
from cogview.training.optim import make_optimizer
from tests.model.helpers import small_model


def trained(seed, steps):
    model = small_model(seed)
    optimizer = make_optimizer(model, TrainConfig())
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randint(0, 60, (2, 9))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture(scope="module")
def pair():
    return trained(0, 3)


def save(folder, step, pair, keep=3):
    model, optimizer = pair
    state = CheckpointState(step, {"loss": [0.5] * step}, 1, {"scale": 2.0}, {"data": "x"})
    return save_checkpoint(folder, state, model, {"optimizer": optimizer}, keep=keep)


def load(path, pair):
    model, optimizer = pair
    return load_checkpoint(path, model, {"optimizer": optimizer})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory, pair):
    """A folder with checkpoints after 100 and 200 steps, to be copied."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, 100, pair)
    save(folder, 200, pair)
    return folder


@pytest.fixture
def saved(tmp_path, two_saved):
    return shutil.copytree(two_saved, tmp_path / "run with a space")


def test_a_checkpoint_restores_weights_and_optimizer(tmp_path, pair):
    model, optimizer = pair
    other, fresh = trained(1, 0)
    state = load(save(tmp_path, 3, pair), (other, fresh))
    assert (state.step, state.history, state.skipped_steps) == (3, {"loss": [0.5] * 3}, 1)
    assert (state.trainer, state.origin) == ({"scale": 2.0}, {"data": "x"})
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert optimizer.state[mine].keys() == fresh.state[theirs].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, fresh.state[theirs][key])


def test_the_newest_are_kept_and_a_half_written_one_does_not_count(tmp_path, pair):
    assert latest_checkpoint(tmp_path / "absent") is None
    for step in (8, 9, 10):
        newest = save(tmp_path, step, pair, keep=2)
    (tmp_path / "writing.tmp").mkdir()  # as a kill in the middle of a save leaves it
    assert latest_checkpoint(tmp_path) == newest
    assert names(tmp_path) == ["step-00000009", "step-00000010", "writing.tmp"]
    save(tmp_path, 11, pair, keep=1)
    assert names(tmp_path) == ["step-00000011"]


def test_what_is_the_users_is_neither_read_nor_removed(tmp_path, pair):
    save(tmp_path, 100, pair)
    shutil.copytree(tmp_path / "step-00000100", tmp_path / "step-00000100-good")
    theirs = ["step-00000100-good", "step-foo.bak", "step-00002500", "step-00000103", "step-9"]
    for name in theirs[1:]:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000103" / "mine").write_text("x")
    (tmp_path / "step-notes.txt").write_text("the good one is that of step 100")
    assert latest_checkpoint(tmp_path).name == "step-00000100"
    for step in (101, 102, 103):
        save(tmp_path, step, pair, keep=1)
    assert latest_checkpoint(tmp_path).name == "step-00000103"
    moved = sorted({*theirs, "step-notes.txt", "step-00000103.before"})
    assert names(tmp_path) == moved
    assert (tmp_path / "step-00000103.before" / "mine").exists()


def refusal(folder, pair):
    with pytest.raises(ValueError) as caught:
        load(latest_checkpoint(folder), pair)
    message = str(caught.value)
    assert "\n" not in message and "step-00000200 is damaged" in message
    return message


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty_of_tensors(path):
    path.write_bytes((2).to_bytes(8, "little") + b"{}")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("model", truncate, "model.safetensors has "),
        ("optimizer", empty_of_tensors, "optimizer.safetensors has 10 of "),
        ("optimizer", flip, "optimizer.safetensors is not the file that was saved with it"),
        ("optimizer", os.unlink, "optimizer.safetensors is missing"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_the_checkpoint_before_is_offered(
    saved, pair, file, damage, reason
):
    damage(saved / "step-00000200" / f"{file}.safetensors")
    before = [parameter.clone() for parameter in pair[0].parameters()]
    message = refusal(saved, pair)
    assert reason in message
    assert "go on from the checkpoint before, step-00000100, move this one away: mv '" in message
    assert all(map(torch.equal, before, pair[0].parameters()))
    (saved / "step-00000200").rename(saved / "step-00000200.damaged")
    assert load(latest_checkpoint(saved), pair).step == 100


def test_a_checkpoint_that_lost_its_state_is_not_passed_over(saved, pair):
    (saved / "step-00000200" / "state.json").unlink()
    message = refusal(saved, pair)
    assert "state.json is missing" in message and "step-00000100, move this one away" in message
    (saved / "step-00000200").rename(saved / "step-00000200.damaged")
    assert load(latest_checkpoint(saved), pair).step == 100


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": 200.0}, "step must be of type int, got 200.0"),
        ({"step": 199}, "that of step 199"),
        ({"history": None}, "history must be of type"),
        ({"history": {"loss": [1.0]}}, "the history of loss must be 200 numbers"),
        ({"history": {"loss": ["x"] * 200}}, "the history of loss must be 200 numbers"),
        ({"skipped_steps": "many"}, "skipped_steps must be of type int, got 'many'"),
        ({"of_tomorrow": 1}, "no field 'of_tomorrow'; a newer version of cogview may have written it"),
        ({"format_version": 99}, "written by a newer version of cogview: its format is 99"),
    ],
)
def test_a_state_that_does_not_fit_is_one_clear_error(saved, pair, changes, reason):
    path = saved / "step-00000200" / "state.json"
    content = json.loads(path.read_text())
    assert content["format_version"] == 1
    path.write_text(json.dumps({**content, **changes}))
    assert reason in refusal(saved, pair)


def test_without_a_checkpoint_before_a_damaged_one_says_so(saved, pair):
    shutil.rmtree(saved / "step-00000100")
    (saved / "step-00000200" / "state.json").write_text("{}")
    message = refusal(saved, pair)
    assert "missing in CheckpointState: step, history" in message
    assert "there is none before it; train again, in another folder" in message


def test_a_checkpoint_of_before_there_were_fingerprints_is_read_but_for_an_empty_file(saved, pair):
    path = saved / "step-00000200" / "state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: content[name] for name in ("step", "history")}))
    assert load(path.parent, pair).step == 200
    empty_of_tensors(path.with_name("optimizer.safetensors"))
    assert "optimizer.safetensors is empty" in refusal(saved, pair)


@contextmanager
def no_room_after(count):
    """The system refuses to write beyond so many bytes of a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100, 450_000])  # the first file fails; a later one does
def test_a_full_disk_loses_nothing_that_is_saved(saved, pair, room):
    size = (saved / "step-00000200" / "model.safetensors").stat().st_size
    assert 100 < size < 450_000 < (saved / "step-00000200" / "optimizer.safetensors").stat().st_size
    with no_room_after(room), pytest.raises(OSError) as caught:
        save(saved, 300, pair, keep=1)
    message = str(caught.value)
    assert "step-00000300 cannot be saved" in message and "File too large" in message
    assert "step-00000200 is whole: once that is mended, the same command goes on from there" in message
    assert names(saved) == ["step-00000100", "step-00000200"]
    assert load(latest_checkpoint(saved), pair).step == 200
    save(saved, 300, pair)
    assert load(latest_checkpoint(saved), pair).step == 300


def test_all_files_of_a_checkpoint_follow_the_umask(tmp_path, pair):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1, pair)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o640"}
