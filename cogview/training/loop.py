# SPDX-License-Identifier: Apache-2.0
"""The one training loop: resume, step, record, save; each training supplies a :class:`Trainer`.

Everything random in a step follows from (seed, step). With the saved weights and optimizer state a resumed
run therefore repeats the losses of an uninterrupted one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cogview.files import StrPath
from cogview.progress import Progress
from cogview.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from cogview.training.interrupt import DeferredInterrupt

History = dict[str, list[float]]


class LoopConfig(Protocol):
    """What the loop reads of a training's settings."""

    @property
    def steps(self) -> int:
        """Steps in all."""

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints."""


@dataclass(frozen=True)
class StepResult:
    """What a step reports."""

    values: Mapping[str, float]  # one for each name in ``Trainer.recorded``
    shown: str  # short form of the values, behind the progress bar
    skipped: str = ""  # why the step changed nothing; empty if it did
    board_only: Mapping[str, float] = field(default_factory=dict)  # TensorBoard gets these beside the values


class Trainer(ABC):
    """What differs between one training and another."""

    label: str  # of the progress display
    board: str  # prefix of the TensorBoard scalars
    checkpoints: str  # folder of the checkpoints, inside the run folder
    recorded: tuple[str, ...]  # names of the values that make up the history

    model: nn.Module
    optimizers: Mapping[str, torch.optim.Optimizer]  # by the name of the file that keeps its state

    @abstractmethod
    def batches(self, first: int) -> Iterator[Any]:
        """The batches of the steps ``first``, ``first + 1``, ... to the last."""

    @abstractmethod
    def step(self, step: int, batch: Any) -> StepResult:
        """Seed what is random, compute the losses, move the weights by :func:`descend`."""


@dataclass(frozen=True)
class Descent:
    """Outcome of :func:`descend`."""

    gradient_norm: float  # before clipping; NaN if the loss was not finite
    skipped: str  # why the weights stay as they were; empty if they moved


def descend(
    loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, *, clip_norm: float = float("inf")
) -> Descent:
    """One step down the gradient of ``loss``, clipped to ``clip_norm``.

    Changes no weight where the loss or a gradient is not finite. Leaves no gradient behind.
    """
    norm = torch.tensor(float("nan"))
    skipped = ""
    if torch.isfinite(loss):
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    if torch.isfinite(norm):
        optimizer.step()
    else:
        skipped = f"loss {loss.item()}, gradient norm {norm.item()}"
    optimizer.zero_grad(set_to_none=True)
    return Descent(norm.item(), skipped)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def run_loop(trainer: Trainer, config: LoopConfig, out: StrPath, *, progress: bool = True) -> History:
    """Train to ``config.steps``, from the latest checkpoint under ``out`` if there is one.

    Writes checkpoints and TensorBoard scalars below ``out``. On Ctrl-C, finishes the step, saves and
    raises KeyboardInterrupt. Returns the history, one value per step under each recorded name, and leaves
    the model in eval mode.
    """
    # TensorBoard takes a second to load, which only a training should pay.
    from torch.utils.tensorboard import SummaryWriter

    out = Path(out)
    folder = out / trainer.checkpoints
    start = 0
    history: History = {name: [] for name in trainer.recorded}
    saved = latest_checkpoint(folder)
    if saved is not None:
        start, history = load_checkpoint(saved, trainer.model, trainer.optimizers)
    trainer.model.train()
    with (
        SummaryWriter(str(out / "tensorboard"), purge_step=start) as board,
        DeferredInterrupt() as interrupt,
        Progress(config.steps, trainer.label, initial=start, enabled=progress) as bar,
    ):
        steps = range(start, config.steps)
        for step, batch in zip(steps, trainer.batches(start), strict=False):
            result = trainer.step(step, batch)
            if result.skipped:
                bar.write(f"step {step}: {result.skipped}; step skipped")
            for name in trainer.recorded:
                history[name].append(result.values[name])
            for name, value in {**result.values, **result.board_only}.items():
                board.add_scalar(f"{trainer.board}/{name}", value, step)
            bar.update(values=result.shown)

            done = step + 1
            if done % config.checkpoint_every == 0 or done == config.steps or interrupt.requested:
                save_checkpoint(folder, done, trainer.model, trainer.optimizers, history)
            if interrupt.requested:
                raise KeyboardInterrupt
    trainer.model.eval()
    return history
