# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import torch

from cogview.config import TrainConfig
from cogview.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_tensors,
    load_weights,
    read_json,
    read_released_weights,
    save_checkpoint,
    save_tensors,
)
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


def test_a_checkpoint_restores_weights_and_optimizer(tmp_path):
    model, optimizer = trained(0, 3)
    path = save_checkpoint(tmp_path, 3, model, optimizer, {"loss": [3.0, 2.0, 1.0]})
    other, fresh = trained(1, 0)
    assert load_checkpoint(path, other, fresh) == (3, {"loss": [3.0, 2.0, 1.0]})
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert optimizer.state[mine].keys() == fresh.state[theirs].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, fresh.state[theirs][key])


def test_only_the_newest_is_kept_and_a_half_written_one_does_not_count(tmp_path):
    model, optimizer = trained(0, 1)
    assert latest_checkpoint(tmp_path / "absent") is None
    save_checkpoint(tmp_path, 9, model, optimizer, {})
    newest = save_checkpoint(tmp_path, 10, model, optimizer, {})
    (tmp_path / "writing.tmp").mkdir()  # as a kill in the middle of a save leaves it
    assert latest_checkpoint(tmp_path) == newest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "writing.tmp"]
    save_checkpoint(tmp_path, 11, model, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000011"]


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


def test_weights_of_another_model_are_one_clear_error():
    model = small_model()
    weights = small_model(num_layers=3).state_dict()
    with pytest.raises(
        ValueError, match=r"file\.x does not hold this model: 0 tensors missing .* 16 unknown"
    ):
        load_weights(model, weights, "file.x")
    weights = small_model(max_positions=30).state_dict()
    with pytest.raises(ValueError, match=r"position_embeddings.weight must be \[40, 64\], got \[30, 64\]"):
        load_weights(model, weights, "file.x")


def released_file(path, prefix=""):
    state = {prefix + name: tensor for name, tensor in small_model(5).half().state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "module": state,
        "iteration": 20000,
        "random_rng_state": random.Random(0).getstate(),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }
    torch.save(content, path)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_weights_with_random_states_are_read(tmp_path, prefix):
    file = tmp_path / "20000" / "mp_rank_00_model_states.pt"
    released_file(file, prefix)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20000\n")
    for path in (file, tmp_path):
        model = small_model()
        load_weights(model, read_released_weights(path), path)
        torch.testing.assert_close(model.state_dict(), small_model(5).state_dict(), atol=1e-3, rtol=1e-3)
    (tmp_path / "20000" / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(ValueError, match="several model-parallel ranks"):
        read_released_weights(tmp_path)


class Evil:
    def __reduce__(self):
        return (print, ("code from a file ran",))


def test_code_in_a_released_file_does_not_run(tmp_path, capsys):
    torch.save({"module": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read safely as weights"):
        read_released_weights(tmp_path / "evil.pt")
    assert "ran" not in capsys.readouterr().out


def test_other_released_files_are_one_clear_error(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        read_released_weights(tmp_path / "list.pt")
    (tmp_path / "bad.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read safely"):
        read_released_weights(tmp_path / "bad.pt")
    with pytest.raises(FileNotFoundError, match=r"give the \.pt file itself"):
        read_released_weights(tmp_path)
