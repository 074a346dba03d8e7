# SPDX-License-Identifier: Apache-2.0
"""Kill a training at random moments, also while it saves, and see that it ends as if nothing had happened.

    python -m tests.kill_runs --kills 20

Each training is forked from this process, which has loaded PyTorch but computed nothing, so a start costs
next to nothing. Half of the kills strike within milliseconds of a checkpoint being written. A run that was
killed must end with the history, the weights and the optimizer's state of one that was not, bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.utils.tensorboard  # loaded once here rather than in every training

from cogview.training.checkpoint import CHECKPOINTS, latest_checkpoint, read_state
from cogview.training.transformer import train
from tests.model.helpers import small_model
from tests.model.test_training_transformer import CONFIG, dataset

COMPARED = ("state.json", "model.safetensors", "optimizer.safetensors")


def start(out: Path, steps: int) -> int:
    """Fork a training into ``out``, with weights that must come from its checkpoint if there is one."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        config = dataclasses.replace(CONFIG, steps=steps, checkpoint_every=3, keep=2)
        seed = 0 if latest_checkpoint(out / CHECKPOINTS) is None else 99
        train(small_model(seed, dropout=0.1), dataset(), config, out, progress=False)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        raise SystemExit(f"a training ended with {code}")


def kill_at_random(child: int, out: Path, seconds: float, choice: random.Random) -> str:
    """Kill the training within ``seconds``; what it was at, or "" if it had ended."""
    writing = out / CHECKPOINTS / "writing.tmp"
    aims_at_a_save = choice.random() < 0.5
    deadline = time.monotonic() + choice.uniform(0, seconds)
    while time.monotonic() < deadline or (aims_at_a_save and not writing.exists()):
        if os.waitpid(child, os.WNOHANG)[0]:
            return ""
        time.sleep(0.0002)
    if aims_at_a_save:
        time.sleep(choice.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "while it saved" if writing.exists() else "between two saves"


def differences(whole: Path, killed: Path) -> list[str]:
    """Files of the last checkpoints that differ."""
    mine, theirs = latest_checkpoint(whole / CHECKPOINTS), latest_checkpoint(killed / CHECKPOINTS)
    assert mine is not None and theirs is not None
    return [name for name in COMPARED if not filecmp.cmp(mine / name, theirs / name, shallow=False)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--steps", type=int, default=40, help="of each training (default: 40)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of their moments")
    options = parser.parse_args()
    torch.set_num_threads(1)
    choice = random.Random(options.seed)
    print(f"{options.kills} kills, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        started = time.monotonic()
        finish(start(whole, options.steps))
        seconds = time.monotonic() - started
        kills, runs = 0, 0
        while kills < options.kills:
            out = Path(folder, f"run-{runs}")
            while kills < options.kills:
                child = start(out, options.steps)
                moment = kill_at_random(child, out, seconds, choice)
                if not moment:
                    break
                kills += 1
                saved = latest_checkpoint(out / CHECKPOINTS)
                at = 0 if saved is None else read_state(saved).step
                print(f"run {runs}: killed {moment}, goes on from step {at}", flush=True)
            else:
                finish(start(out, options.steps))
            runs += 1
            if different := differences(whole, out):
                raise SystemExit(f"run {runs - 1} differs from the one that was not killed: {different}")
            print(f"run {runs - 1}: ended like the run that was not killed, bit for bit", flush=True)


if __name__ == "__main__":
    main()
