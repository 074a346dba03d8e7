# SPDX-License-Identifier: Apache-2.0
"""The program behind ``test_distributed.py``: trains on 4, 2, 1 and 4 ranks, kills one, reports all.

``report(folder, run)`` writes ``folder/report.json``; ``run`` is a run folder with tokenizers of the digits.
The ranks are started by torchrun's own agent. It forks them from a server that has imported everything,
because to import PyTorch takes seconds, and there are 14 of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What no rank should have to load again.
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.tensorboard  # noqa: F401
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import cogview.data.digits
import cogview.training.transformer
from cogview.cli import main
from cogview.config import TrainConfig
from cogview.model.transformer import CogView
from cogview.training import distributed
from cogview.training.transformer import TrainingData, TransformerTrainer, train
from tests.model.helpers import small_model
from tests.model.test_training_transformer import CONFIG, dataset

# Neither the ranks nor the parts on each of them can share 9 rows evenly.
WANDERING = dataclasses.replace(CONFIG, batch_size=9, keep=9)
MIXED = dataclasses.replace(CONFIG, batch_size=9, steps=4, precision="fp16", accumulate=2)
# The parts that MIXED has on two ranks. In other parts, other sums would overflow.
MIXED_ALONE = dataclasses.replace(MIXED, accumulate=4)
SPOILT = 2  # the step of MIXED in which one rank has a loss that is not finite


def model(seed: int) -> CogView:
    return small_model(seed, hidden_size=32, activation_checkpointing=True)


def data() -> TrainingData:
    """The same rows to train and to validate on: what counts is that all ranks together validate on all."""
    return TrainingData(dataset(), dataset())


def before_step(step: int, action: Callable[[], None]) -> None:
    """Calls ``action`` in later trainings of this process."""
    real = TransformerTrainer.step

    def stepping(self: TransformerTrainer, number: int, batch: Any) -> Any:
        if number == step:
            action()
        return real(self, number, batch)

    TransformerTrainer.step = stepping  # type: ignore[method-assign]


def signal_before_step(step: int, signum: int) -> None:
    before_step(step, lambda: os.kill(os.getpid(), signum))


def outcome(folder: Path, seed: int, config: TrainConfig = WANDERING) -> str | dict[str, list[float]]:
    """The history of a training, or the name of the signal that ended it. The seed must not matter."""
    try:
        return train(model(seed), data(), config, folder, progress=False)
    except KeyboardInterrupt as interrupt:
        return str(interrupt)


@contextlib.contextmanager
def spoilt_losses(spoils: bool) -> Iterator[None]:
    """Within the block, the loss of step ``SPOILT`` is NaN where ``spoils``."""
    real_losses, real_gradient = cogview.training.transformer.losses_of, TransformerTrainer._gradient
    now = [0]

    def gradient(self: TransformerTrainer, step: int, *arguments: Any) -> Any:
        now[0] = step
        return real_gradient(self, step, *arguments)

    def losses(*arguments: Any) -> Any:
        loss, image, text = real_losses(*arguments)
        return (loss * float("nan") if spoils and now[0] == SPOILT else loss), image, text

    cogview.training.transformer.losses_of = losses
    TransformerTrainer._gradient = gradient  # type: ignore[method-assign]
    yield
    cogview.training.transformer.losses_of = real_losses
    TransformerTrainer._gradient = real_gradient  # type: ignore[method-assign]


def killed_and_interrupted(folder: Path) -> dict[str, Any]:
    """Rank 3 dies before step 5, after the checkpoint of step 4. Started again, rank 1 gets a Ctrl-C."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with distributed.joined_ranks("cpu"):
        if attempt == 0 and distributed.rank() == 3:
            signal_before_step(5, signal.SIGKILL)
        if attempt == 1 and distributed.rank() == 1:
            signal_before_step(6, signal.SIGINT)
        return {"attempt": attempt, "outcome": outcome(folder / "wandering", attempt)}


def two_ranks(folder: Path, words: list[str]) -> dict[str, Any]:
    """Goes on until a SIGTERM; trains in 16 bits with a NaN on one rank; trains by the command."""
    cogview.data.digits.TRAINING_COPIES = 1
    result: dict[str, Any] = {}
    said, errors = io.StringIO(), io.StringIO()
    with (
        distributed.joined_ranks("cpu"),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(errors),
    ):
        with spoilt_losses(distributed.rank() == 1):
            result["mixed"] = outcome(folder / "mixed", 0, MIXED)
        result["mixed errors"] = errors.getvalue()
        result["exit"] = main(words)
        result["said"] = said.getvalue() + errors.getvalue()
        if distributed.rank() == 0:
            signal_before_step(8, signal.SIGTERM)
        result["outcome"] = outcome(folder / "wandering", 2)
    return result


def finishing(folder: Path) -> dict[str, Any]:
    with distributed.joined_ranks("cpu"):
        return {"outcome": outcome(folder / "wandering", 3)}


def launch(ranks: int, function: Callable[..., Any], *arguments: Any, restarts: int = 0) -> list[Any]:
    """What ``function`` returned on each rank, started as by ``torchrun --standalone``."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="forkserver",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=function.__name__,
        local_addr="localhost",
    )
    results = elastic_launch(config, function)(*arguments)
    return [results[rank] for rank in range(ranks)]


def report(folder: Path, run: Path) -> None:
    multiprocessing.set_forkserver_preload([__name__])
    words = ["train", "--data", "digits", "--out", str(run), "--device", "cpu", "--steps", "2"]
    words += ["--batch-size", "4", "--model.num-layers", "1", "--samples-every", "1"]
    result = {
        "four": launch(4, killed_and_interrupted, folder, restarts=1),
        "two": launch(2, two_ranks, folder, words),
    }
    signal_before_step(9, signal.SIGINT)
    result["one"] = [{"outcome": outcome(folder / "wandering", 4)}]
    result["four again"] = launch(4, finishing, folder)
    with spoilt_losses(True):
        result["mixed alone"] = outcome(folder / "mixed alone", 0, MIXED_ALONE)
    (folder / "report.json").write_text(json.dumps(result))
