# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training: safetensors and JSON only, whole or absent.

A checkpoint is a folder ``step-00000400`` with ``model.safetensors``, ``optimizer.safetensors`` and
``state.json``. It appears under its name only when complete, so a kill at any moment leaves the previous
one intact. Random numbers need no saving: training derives them from (seed, step).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cogview.files import StrPath, load_tensors, read_json, save_tensors, write_json
from cogview.weights import load_weights


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def save_checkpoint(
    folder: StrPath,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: Mapping[str, list[float]],
) -> Path:
    """Save the state after ``step`` steps as ``folder/step-...`` and remove older ones."""
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    aside = folder / "writing.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_tensors(aside / "model.safetensors", model.state_dict())
    save_tensors(aside / "optimizer.safetensors", _optimizer_tensors(model, optimizer))
    write_json(aside / "state.json", {"step": step, "history": dict(history)})
    shutil.rmtree(final, ignore_errors=True)
    os.rename(aside, final)
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old)
    return final


def latest_checkpoint(folder: StrPath) -> Path | None:
    """The complete checkpoint with the most steps in ``folder``, if there is one."""
    return max(Path(folder).glob("step-*"), default=None)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, list[float]]]:
    """Restore model and optimizer; returns the steps done and the history of losses."""
    state = read_json(path / "state.json")
    load_weights(model, load_tensors(path / "model.safetensors"), path)
    tensors = load_tensors(path / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        keys = [key for key in tensors if key.startswith(f"{name}/")]
        optimizer.state[parameter] = {
            key.rpartition("/")[2]: tensors[key].to("cpu" if key.endswith("/step") else parameter.device)
            for key in keys
        }
    return state["step"], state["history"]
