# SPDX-License-Identifier: Apache-2.0
"""The one training loop: resume, step, record, save; each training supplies a :class:`Trainer`.

Everything random in a step follows from (seed, step). With the saved weights and optimizer state a resumed
run therefore repeats the losses of an uninterrupted one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cogview.files import StrPath
from cogview.progress import Progress
from cogview.training import distributed
from cogview.training.board import Board
from cogview.training.checkpoint import (
    CheckpointState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from cogview.training.interrupt import DeferredInterrupt
from cogview.training.speed import Stopwatch

History = dict[str, list[float]]


class LoopConfig(Protocol):
    """What the loop reads of a training's settings."""

    @property
    def steps(self) -> int:
        """Steps in all."""

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints."""

    @property
    def keep(self) -> int:
        """Checkpoints that are kept, the last ones."""


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
    origin: Mapping[str, str] = MappingProxyType({})  # fingerprints of what is trained on, for checkpoints
    samples_every: int = 0  # steps between two pictures for the board; 0 = none

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

    def speed(self, seconds: float) -> Mapping[str, float]:
        """What a step that took ``seconds`` means, for the board: tokens per second, memory and the like."""
        return {}

    def sample(self) -> Any:
        """A PIL picture that shows what the model can do; only asked for where ``samples_every`` is not 0.

        It must leave all that later steps depend on as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} has samples_every but draws no samples")

    def validate(self) -> dict[str, float]:
        """Losses on data that are not trained on, at each checkpoint; empty where there are none.

        It must leave all that later steps depend on as it is, and the model in training mode.
        """
        return {}

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


def late_mean(values: Sequence[float]) -> float:
    """Mean of the last 50 steps, without the skipped ones. FloatingPointError if all of them were skipped."""
    last = [value for value in values[-50:] if math.isfinite(value)]
    if not last:
        raise FloatingPointError(
            "none of the last steps had a finite loss, so all were skipped and the weights are of no use; "
            "train anew in another folder, with a lower learning rate"
        )
    return sum(last) / len(last)


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

    def __init__(self, trainer: Trainer, resumed: CheckpointState, board: Board, bar: Progress) -> None:
        self.history: History = resumed.history
        self.skipped_steps = resumed.skipped_steps
        self._trainer, self._board, self._bar = trainer, board, bar
        self._unread: list[tuple[int, Any, StepResult]] = []
        self._watch = Stopwatch()

    def add(self, step: int, batch: Any, result: StepResult) -> None:
        self._unread.append((step, batch, result))

    def read(self) -> None:
        """Read, record and show all of them; the device has to finish the steps for that."""
        trainer = self._trainer
        all_values = _read([result for _, _, result in self._unread])
        speed = trainer.speed(self._watch.lap(len(all_values)))
        for (step, batch, result), values in zip(self._unread, all_values, strict=True):
            if values["skipped"]:
                self.skipped_steps += 1
                where = trainer.explain(step, batch, values)
                loss, norm = values["loss"], values["gradient_norm"]
                because = f", as {where} was not finite" if where else ""
                self._bar.write(f"step {step}: loss {loss}, gradient norm {norm}; step skipped{because}")
                self._board.scalar(f"{trainer.board}/skipped_steps", self.skipped_steps, step)
            for name in trainer.recorded:
                self.history[name].append(values[name])
            for name in (*result.values, *result.board_only, "gradient_norm"):
                self._board.scalar(f"{trainer.board}/{name}", values[name], step)
        self._bar.update(len(all_values), trainer.shown(all_values[-1]))
        for name, value in speed.items():
            self._board.scalar(f"{trainer.board}/{name}", value, self._unread[-1][0])
        self._unread.clear()

    def sample(self, done: int) -> None:
        """A picture for the board, where one is due after ``done`` steps."""
        every = self._trainer.samples_every
        if every and done % every == 0:
            self._board.picture(f"{self._trainer.board}/samples", self._trainer.sample(), done)

    def validate(self, done: int) -> None:
        """Record and show what data that are not trained on say after ``done`` steps."""
        values = self._trainer.validate()
        for name, value in values.items():
            self._board.scalar(f"{self._trainer.board}/validation_{name}", value, done - 1)
        if values:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            self._bar.write(f"after {done} steps, validation: {shown}")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done in the block is no part of a step's time."""
        yield
        self._watch.restart()

    def state(self, done: int) -> CheckpointState:
        """What a checkpoint after ``done`` steps keeps beside the tensors."""
        trainer = self._trainer
        return CheckpointState(
            done, self.history, self.skipped_steps, trainer.state(), origin=dict(trainer.origin)
        )


def _resume(trainer: Trainer, folder: Path, steps: int) -> CheckpointState:
    """Put ``trainer`` where the latest checkpoint left it; the state of step 0 if there is none."""
    saved = distributed.of_all_ranks(latest_checkpoint(folder))[0]  # the same for all, however slow the disk
    if saved is None:
        return CheckpointState(0, {name: [] for name in trainer.recorded})
    state = load_checkpoint(saved, trainer.model, trainer.optimizers)
    if not state.history.keys() >= set(trainer.recorded):
        absent = ", ".join(sorted(set(trainer.recorded) - state.history.keys()))
        raise ValueError(
            f"{saved} has no history of {absent}; it is of another training: choose another folder"
        )
    if state.step > steps:
        raise ValueError(
            f"{saved} has more steps than the {steps} asked for; ask for at least {state.step}, "
            "or choose another folder"
        )
    trainer.load_state(state.trainer, saved)
    return state


def run_loop(trainer: Trainer, config: LoopConfig, out: StrPath, *, progress: bool = True) -> History:
    """Train to ``config.steps``, from the latest checkpoint under ``out`` if there is one.

    Writes checkpoints and TensorBoard scalars below ``out``, and tells of every skipped step and of their
    number. It reads what the steps report every ``trainer.log_every`` steps and before each checkpoint, and
    does not wait for the device in between. On Ctrl-C, SIGTERM or SIGHUP, finishes the step, saves and raises
    a KeyboardInterrupt. Returns the history, one value per step under each recorded name, and leaves the
    model in eval mode. All ranks together: they stop after the same step, whichever of them is interrupted,
    and only the first one shows anything.
    """
    out = Path(out)
    folder = out / trainer.checkpoints
    resumed = _resume(trainer, folder, config.steps)
    if resumed.step == config.steps:
        trainer.model.eval()
        return resumed.history
    trainer.model.train()
    with (
        DeferredInterrupt(ranks=distributed.num_ranks(), tells=distributed.is_first()) as interrupt,
        distributed.only_first(
            lambda: Progress(config.steps, trainer.label, initial=resumed.step, enabled=progress)
        ) as bar,
        distributed.only_first(lambda: Board(out / "tensorboard", resumed.step, bar.write)) as board,
    ):
        report = _Report(trainer, resumed, board, bar)
        batches = trainer.batches(resumed.step)
        for step in range(resumed.step, config.steps):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(
                    f"{type(trainer).__name__}.batches must give those of steps {resumed.step} to "
                    f"{config.steps - 1}, ended before step {step}"
                )
            report.add(step, batch, trainer.step(step, batch))
            done = step + 1
            stops = distributed.any_rank(interrupt.requested)
            saves = done % config.checkpoint_every == 0 or done == config.steps or stops
            if saves or done % trainer.log_every == 0:
                report.read()
            with report.pause():
                if saves:
                    state = report.state(done)
                    save_checkpoint(folder, state, trainer.model, trainer.optimizers, keep=config.keep)
                    if stops:
                        raise interrupt.exception()
                    report.validate(done)
                report.sample(done)
        if report.skipped_steps:
            bar.write(f"{report.skipped_steps} of {config.steps} steps skipped")
    trainer.model.eval()
    return report.history
