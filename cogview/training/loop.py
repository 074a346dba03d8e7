# SPDX-License-Identifier: Apache-2.0
"""The one training loop: resume, step, record, save; each training supplies a :class:`Trainer`.

Everything random in a step follows from (seed, step). With the saved weights and optimizer state a resumed
run therefore repeats the losses of an uninterrupted one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cogview.files import StrPath
from cogview.progress import Progress
from cogview.training import distributed
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
class Descent:
    """Outcome of :func:`descend`: 0-d tensors, so that to make one does not wait for the device."""

    loss: Tensor
    gradient_norm: Tensor  # before clipping, of the gradients without their scale; NaN after a bad loss
    skipped: Tensor  # bool: the weights and the optimizer's state stay as they were


@dataclass(frozen=True)
class StepResult:
    """What a step reports: numbers, or 0-d tensors, which are read only when they are shown."""

    values: Mapping[str, float | Tensor]  # one for each name in ``Trainer.recorded``
    descent: Descent
    board_only: Mapping[str, float | Tensor] = field(default_factory=dict)  # TensorBoard gets these as well


class Trainer(ABC):
    """What differs between one training and another."""

    label: str  # of the progress display
    board: str  # prefix of the TensorBoard scalars
    checkpoints: str  # folder of the checkpoints, inside the run folder
    recorded: tuple[str, ...]  # names of the values that make up the history
    log_every: int = 1  # steps after which the host waits for the device and reports

    model: nn.Module
    optimizers: Mapping[str, torch.optim.Optimizer]  # by the name of the file that keeps its state

    @abstractmethod
    def batches(self, first: int) -> Iterator[Any]:
        """The batches of the steps ``first``, ``first + 1``, ... to the last."""

    @abstractmethod
    def step(self, step: int, batch: Any) -> StepResult:
        """Seed what is random, compute the losses, move the weights by :func:`descend`."""

    @abstractmethod
    def shown(self, values: Mapping[str, float]) -> str:
        """Short form of a step's values, behind the progress bar."""

    def explain(self, step: int, batch: Any, values: Mapping[str, float]) -> str:
        """Where the first value that is not finite arose in a skipped step; empty if that is not known.

        Called once ``values`` of the step have been read, those of ``board_only`` included. The weights are
        those after the steps that were reported with it, at most ``log_every - 1`` later ones. It must leave
        them, and all that later steps depend on, as they are.
        """
        return ""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights and optimizers, for JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any], source: Path) -> None:
        """Go on from :meth:`state`, or from nothing if the checkpoint ``source`` is older than it."""
        return


def backward(loss: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
    """Add the gradient of ``loss``, times the scale if there is a scaler, to that of the parameters.

    A loss that is not finite makes every gradient NaN, even where the loss is constant.
    """
    one = 1 + 0 * loss.detach()
    (loss if scaler is None else scaler.scale(loss)).backward(one)


def descend(
    loss: Tensor,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    clip_norm: float = float("inf"),
    scaler: torch.amp.GradScaler | None = None,
) -> Descent:
    """One step down the gradient that :func:`backward` left, clipped to ``clip_norm``.

    Changes no weight where a gradient is not finite. Leaves no gradient behind. A fused optimizer decides
    on the device whether it moves; with another one the host waits for the norm.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = distributed.whole(nn.utils.clip_grad_norm_(model.parameters(), clip_norm))
    skipped = ~torch.isfinite(norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        # GradScaler tells a fused optimizer by these two attributes what its kernel is to do.
        moves: Any = optimizer
        moves.grad_scale, moves.found_inf = None, skipped.float()
        optimizer.step()
        del moves.grad_scale, moves.found_inf
    elif not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Descent(loss.detach(), norm, skipped)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _read(results: Sequence[StepResult]) -> list[dict[str, float]]:
    """All numbers of some steps, after one wait for the device."""
    named: list[dict[str, float | Tensor]] = [
        {
            **result.values,
            **result.board_only,
            "loss": result.descent.loss,
            "gradient_norm": result.descent.gradient_norm,
            "skipped": result.descent.skipped,
        }
        for result in results
    ]
    tensors = [value for values in named for value in values.values() if isinstance(value, Tensor)]
    read = iter(torch.stack([tensor.detach().float() for tensor in tensors]).tolist())
    return [
        {name: next(read) if isinstance(value, Tensor) else value for name, value in values.items()}
        for values in named
    ]


class _Report:
    """Numbers of the steps that nobody has read yet, and where they go once they are read."""

    def __init__(self, trainer: Trainer, history: History, board: Any, bar: Progress) -> None:
        self.skipped_steps = 0
        self._trainer, self._history, self._board, self._bar = trainer, history, board, bar
        self._unread: list[tuple[int, Any, StepResult]] = []

    def add(self, step: int, batch: Any, result: StepResult) -> None:
        self._unread.append((step, batch, result))

    def read(self) -> None:
        """Read, record and show all of them; the device has to finish the steps for that."""
        trainer = self._trainer
        all_values = _read([result for _, _, result in self._unread])
        for (step, batch, result), values in zip(self._unread, all_values, strict=True):
            if values["skipped"]:
                self.skipped_steps += 1
                where = trainer.explain(step, batch, values)
                loss, norm = values["loss"], values["gradient_norm"]
                because = f", as {where} was not finite" if where else ""
                self._bar.write(f"step {step}: loss {loss}, gradient norm {norm}; step skipped{because}")
                self._board.add_scalar(f"{trainer.board}/skipped_steps", self.skipped_steps, step)
            for name in trainer.recorded:
                self._history[name].append(values[name])
            for name in (*result.values, *result.board_only, "gradient_norm"):
                self._board.add_scalar(f"{trainer.board}/{name}", values[name], step)
            self._bar.update(values=trainer.shown(values))
        self._unread.clear()


def run_loop(trainer: Trainer, config: LoopConfig, out: StrPath, *, progress: bool = True) -> History:
    """Train to ``config.steps``, from the latest checkpoint under ``out`` if there is one.

    Writes checkpoints and TensorBoard scalars below ``out``, and tells of every skipped step and of their
    number. It reads what the steps report every ``trainer.log_every`` steps and before each checkpoint, and
    does not wait for the device in between. On Ctrl-C, finishes the step, saves and raises KeyboardInterrupt.
    Returns the history, one value per step under each recorded name, and leaves the model in eval mode.
    All ranks together; the first one alone shows and records, and all stop where one of them was interrupted.
    """
    # TensorBoard takes a second to load, which only a training should pay.
    from torch.utils.tensorboard import SummaryWriter

    out = Path(out)
    folder = out / trainer.checkpoints
    start, skipped_steps = 0, 0
    history: History = {name: [] for name in trainer.recorded}
    saved = distributed.of_all_ranks(latest_checkpoint(folder))[0]  # one answer, however the disk is shared
    if saved is not None:
        start, history, state = load_checkpoint(saved, trainer.model, trainer.optimizers)
        trainer.load_state(state.get("trainer", {}), saved)
        skipped_steps = state.get("skipped_steps", 0)
    trainer.model.train()
    board: Any = distributed.Silence()
    shown: Any = distributed.Silence()
    if distributed.is_first():
        board = SummaryWriter(str(out / "tensorboard"), purge_step=start)
        shown = Progress(config.steps, trainer.label, initial=start, enabled=progress)
    with board as board, DeferredInterrupt() as interrupt, shown as bar:
        report = _Report(trainer, history, board, bar)
        report.skipped_steps = skipped_steps
        steps = range(start, config.steps)
        for step, batch in zip(steps, trainer.batches(start), strict=False):
            report.add(step, batch, trainer.step(step, batch))
            done = step + 1
            stops = distributed.any_rank(interrupt.requested)
            saves = done % config.checkpoint_every == 0 or done == config.steps or stops
            if saves or done % trainer.log_every == 0:
                report.read()
            if saves:
                state = {"skipped_steps": report.skipped_steps, "trainer": trainer.state()}
                save_checkpoint(folder, done, trainer.model, trainer.optimizers, history, state)
            if stops:
                raise KeyboardInterrupt
        if steps and report.skipped_steps:
            bar.write(f"{report.skipped_steps} of {config.steps} steps skipped")
    trainer.model.eval()
    return history
