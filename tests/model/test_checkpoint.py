# SPDX-License-Identifier: Apache-2.0
import torch

from cogview.config import TrainConfig
from cogview.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
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
    path = save_checkpoint(
        tmp_path, 3, model, {"optimizer": optimizer}, {"loss": [3.0, 2.0, 1.0]}, {"scale": 2.0}
    )
    other, fresh = trained(1, 0)
    assert load_checkpoint(path, other, {"optimizer": fresh}) == (
        3,
        {"loss": [3.0, 2.0, 1.0]},
        {"scale": 2.0},
    )
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert optimizer.state[mine].keys() == fresh.state[theirs].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, fresh.state[theirs][key])


def test_only_the_newest_is_kept_and_a_half_written_one_does_not_count(tmp_path):
    model, optimizer = trained(0, 1)
    assert latest_checkpoint(tmp_path / "absent") is None
    save_checkpoint(tmp_path, 9, model, {"optimizer": optimizer}, {}, {})
    newest = save_checkpoint(tmp_path, 10, model, {"optimizer": optimizer}, {}, {})
    (tmp_path / "writing.tmp").mkdir()  # as a kill in the middle of a save leaves it
    assert latest_checkpoint(tmp_path) == newest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "writing.tmp"]
    save_checkpoint(tmp_path, 11, model, {"optimizer": optimizer}, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000011"]
