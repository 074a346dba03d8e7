# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training: safetensors and JSON only, whole or absent.

A checkpoint is a folder ``step-00000400`` with ``model.safetensors``, a file for each optimizer
(``optimizer.safetensors`` where there is one) and ``state.json``. It appears under its name only when
complete, so a kill at any moment leaves the previous one intact. Random numbers need no saving: training
derives them from (seed, step).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogview.files import StrPath, load_tensors, read_json, save_tensors, write_json
from cogview.weights import load_weights

CHECKPOINTS = "checkpoints"  # of the transformer, in its run folder

Optimizers = Mapping[str, torch.optim.Optimizer]


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Name of each parameter that ``optimizer`` moves, by the parameter's number in its state dict."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index: names[id(parameter)] for index, parameter in enumerate(parameters)}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state, names = optimizer.state_dict()["state"], _names(model, optimizer)
    return {f"{names[index]}/{key}": value for index in state for key, value in state[index].items()}


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """The optimizer puts each tensor on the device where it wants it."""
    of_parameter: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        of_parameter.setdefault(name, {})[key] = tensor
    state = {
        index: of_parameter[name] for index, name in _names(model, optimizer).items() if name in of_parameter
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    folder: StrPath,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    history: Mapping[str, list[float]],
    state: Mapping[str, Any],
) -> Path:
    """Save the state after ``step`` steps as ``folder/step-...`` and remove older ones.

    ``state`` is whatever else the training needs to go on, for JSON.
    """
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    aside = folder / "writing.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_tensors(aside / "model.safetensors", model.state_dict())
    for name, optimizer in optimizers.items():
        save_tensors(aside / f"{name}.safetensors", _optimizer_tensors(model, optimizer))
    write_json(aside / "state.json", {**state, "step": step, "history": dict(history)})
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
    path: Path, model: nn.Module, optimizers: Optimizers
) -> tuple[int, dict[str, list[float]], dict[str, Any]]:
    """Restore model and optimizers; returns the steps done, the history of losses and what else was saved."""
    state = read_json(path / "state.json")
    load_weights(model, load_tensors(path / "model.safetensors"), path)
    for name, optimizer in optimizers.items():
        _restore_optimizer(model, optimizer, load_tensors(path / f"{name}.safetensors"))
    return state.pop("step"), state.pop("history"), state
