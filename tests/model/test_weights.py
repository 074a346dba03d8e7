# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import torch

from cogview.weights import load_weights, read_released_weights
from tests.model.helpers import small_model


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
