# SPDX-License-Identifier: Apache-2.0
"""The loop itself, with a trainer of two small networks and two optimizers."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import cogview.training.loop
from cogview.seeding import derive_seed
from cogview.training.loop import StepResult, Trainer, backward, descend, run_loop


@dataclass(frozen=True)
class Config:
    steps: int = 10
    checkpoint_every: int = 4
    keep: int = 1


class Duel(Trainer):
    """One half learns to be 3, the other to be the negative of the first, from noise of the step's seed."""

    label = "duel"
    board = "duel"
    checkpoints = "duel-checkpoints"
    recorded = ("first", "second")

    def __init__(self, steps, spoil=None, seed=0):
        torch.manual_seed(seed)
        self.model = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
        self.optimizers = {
            "first": torch.optim.Adam(self.model["a"].parameters(), lr=0.1, fused=True),
            "second": torch.optim.SGD(self.model["b"].parameters(), lr=0.1, momentum=0.9),
        }
        self.steps, self.spoil = steps, spoil

    def batches(self, first):
        for step in range(first, self.steps):
            yield torch.randn(5, 4, generator=torch.Generator().manual_seed(step))

    def step(self, step, batch):
        torch.manual_seed(derive_seed(0, step))
        noise = torch.randn(5, 1)
        first = (self.model["a"](batch) - 3 + noise).square().mean()
        if step == self.spoil:
            first = first * float("nan")
        backward(first)
        outcome = descend(first, self.model, self.optimizers["first"], clip_norm=1.0)
        second = (self.model["b"](batch) + self.model["a"](batch).detach()).square().mean()
        backward(second)
        descend(second, self.model, self.optimizers["second"])
        return StepResult({"first": first, "second": second}, outcome)

    def shown(self, values):
        return f"first {values['first']:.3f}"

    def state(self):
        return {"spoil": self.spoil}

    def load_state(self, state, source):
        self.loaded = state


def test_a_killed_run_resumes_to_the_same_history_with_every_optimizer(tmp_path):
    whole, trainer = Duel(10), Duel(10)
    expected = run_loop(whole, Config(), tmp_path / "whole", progress=False)
    real = trainer.step

    def dies(step, batch):
        if step == 6:
            raise RuntimeError("killed")
        return real(step, batch)

    trainer.step = dies
    with pytest.raises(RuntimeError, match="killed"):
        run_loop(trainer, Config(), tmp_path / "cut", progress=False)
    other = Duel(10, seed=7)
    assert run_loop(other, Config(), tmp_path / "cut", progress=False) == expected
    for mine, theirs in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    (folder,) = (tmp_path / "cut" / "duel-checkpoints").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "first.safetensors",
        "model.safetensors",
        "second.safetensors",
        "state.json",
    ]


def test_batches_that_run_out_do_not_end_a_training_in_silence(tmp_path):
    with pytest.raises(ValueError, match=r"Duel\.batches must give .* steps 0 to 9, ended before step 7"):
        run_loop(Duel(7), Config(), tmp_path, progress=False)


@pytest.mark.parametrize("every", [1, 3, 100])
def test_steps_are_read_every_few_steps_and_before_each_checkpoint(tmp_path, monkeypatch, every):
    expected = run_loop(Duel(10), Config(), tmp_path / "1", progress=False)
    real, read = cogview.training.loop._read, []
    monkeypatch.setattr(
        cogview.training.loop, "_read", lambda results: read.append(len(results)) or real(results)
    )
    trainer = Duel(10)
    trainer.log_every = every
    assert run_loop(trainer, Config(), tmp_path / "2", progress=False) == expected
    assert read == {1: [1] * 10, 3: [3, 1, 2, 2, 1, 1], 100: [4, 4, 2]}[every]


def test_skipped_steps_are_told_with_their_own_numbers_however_late(tmp_path, capsys):
    trainer = Duel(5, spoil=2)
    trainer.log_every = 5
    run_loop(trainer, Config(steps=5, checkpoint_every=100), tmp_path, progress=False)
    shown = capsys.readouterr().err
    assert "step 2: loss nan" in shown and "1 of 5 steps skipped" in shown


def test_progress_counts_all_steps_that_were_read(tmp_path, capsys):
    """One by one, the first line would give the time of many steps to one."""
    trainer = Duel(10)
    trainer.log_every = 4
    run_loop(trainer, Config(steps=10, checkpoint_every=100), tmp_path, progress=True)
    assert "step 4 of 10" in capsys.readouterr().err.splitlines()[0]


def test_a_finished_run_takes_no_step(tmp_path):
    expected = run_loop(Duel(10), Config(), tmp_path, progress=False)
    trainer = Duel(10)
    trainer.step = None
    assert run_loop(trainer, Config(), tmp_path, progress=False) == expected
    assert not trainer.model.training


def test_an_interrupt_ends_the_step_and_saves(tmp_path, monkeypatch):
    trainer = Duel(10)
    real = trainer.step
    interrupts = []

    class Interrupt(cogview.training.loop.DeferredInterrupt):
        def __enter__(self):
            interrupts.append(self)
            return self

        def __exit__(self, *details):
            pass

    def interrupted(step, batch):
        interrupts[0].requested = step == 2
        return real(step, batch)

    monkeypatch.setattr(cogview.training.loop, "DeferredInterrupt", Interrupt)
    trainer.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run_loop(trainer, Config(), tmp_path, progress=False)
    assert [path.name for path in (tmp_path / "duel-checkpoints").iterdir()] == ["step-00000003"]


def test_a_skipped_step_is_reported_and_changes_only_what_it_must(tmp_path, capsys):
    trainer = Duel(1, spoil=0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    run_loop(trainer, Config(steps=1), tmp_path, progress=False)
    changed = {
        name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"b.weight", "b.bias"}
    shown = capsys.readouterr().err
    assert "step 0: loss nan, gradient norm nan; step skipped\n" in shown
    assert "1 of 1 steps skipped" in shown


def test_the_number_of_skipped_steps_and_the_state_of_the_trainer_survive_a_resumption(tmp_path, capsys):
    run_loop(Duel(4, spoil=1), Config(steps=4), tmp_path, progress=False)
    capsys.readouterr()
    other = Duel(10, spoil=5)
    run_loop(other, Config(), tmp_path, progress=False)
    assert other.loaded == {"spoil": 1}
    assert "2 of 10 steps skipped" in capsys.readouterr().err


def test_a_checkpoint_without_a_state_of_the_trainer_is_gone_on_with(tmp_path):
    expected = run_loop(Duel(10), Config(), tmp_path / "whole", progress=False)
    run_loop(Duel(4), Config(steps=4), tmp_path / "cut", progress=False)
    (path,) = (tmp_path / "cut" / "duel-checkpoints").glob("*/state.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: content[name] for name in ("step", "history")}))
    other = Duel(10, seed=3)
    assert run_loop(other, Config(), tmp_path / "cut", progress=False) == expected
    assert other.loaded == {}


OPTIMIZERS = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1.0, fused=True),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("at", ["loss", "constant", "gradient"])
def test_nothing_moves_where_the_loss_or_a_gradient_is_not_finite(at, kind, scaled):
    model = nn.Linear(2, 1)
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    before = model.weight.clone()
    # The square root has the value 0 and an infinite slope at 0.
    loss = {
        "loss": model.weight.sum() * float("inf"),
        "constant": model.weight.sum() + float("inf"),
        "gradient": (model.weight * 0).sum().sqrt(),
    }[at]
    backward(loss, scaler)
    outcome = descend(loss, model, optimizer, scaler=scaler)
    assert outcome.skipped and outcome.gradient_norm.isnan()
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None
    backward(model.weight.sum(), scaler)
    assert not descend(loss, model, optimizer, scaler=scaler).skipped
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_is_clipped_without_its_scale(scaled):
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    loss = (model.weight * torch.tensor([[3.0, 4.0]])).sum()
    backward(loss, scaler)
    outcome = descend(loss, model, optimizer, clip_norm=1.0, scaler=scaler)
    assert outcome.gradient_norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(before - model.weight, torch.tensor([[0.6, 0.8]]))
