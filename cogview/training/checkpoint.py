# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training: safetensors and JSON only, whole or absent.

A checkpoint is a folder ``step-00000400`` with ``model.safetensors``, a file for each optimizer
(``optimizer.safetensors`` where there is one) and ``state.json``. It appears under its name only when
complete, so a kill at any moment leaves the previous one intact. Random numbers need no saving: training
derives them from (seed, step).

Several ranks write the same, but for the optimizers: each rank writes its own part of their state, as
``optimizer-00001-of-00004.safetensors``, ... A checkpoint of either kind is read by any number of ranks.
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
from cogview.training import distributed
from cogview.training.shards import load_shards, save_shards
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
    """Save the state after ``step`` steps as ``folder/step-...`` and remove older ones. All ranks together.

    ``state`` is whatever else the training needs to go on, for JSON.
    """
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    aside = folder / "writing.tmp"
    if distributed.is_first():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    distributed.wait_for_all()
    weights = distributed.gathered_on_first(model.state_dict())
    for name, optimizer in optimizers.items():
        if distributed.num_ranks() > 1:
            save_shards(aside, name, _optimizer_tensors(model, optimizer))
        else:
            save_tensors(aside / f"{name}.safetensors", _optimizer_tensors(model, optimizer))
    if distributed.is_first():
        save_tensors(aside / "model.safetensors", weights)
        write_json(aside / "state.json", {**state, "step": step, "history": dict(history)})
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        for old in folder.glob("step-*"):
            if old != final:
                shutil.rmtree(old)
    distributed.wait_for_all()
    return final


def latest_checkpoint(folder: StrPath) -> Path | None:
    """The complete checkpoint with the most steps in ``folder``, if there is one."""
    return max(Path(folder).glob("step-*"), default=None)


def load_checkpoint(
    path: Path, model: nn.Module, optimizers: Optimizers
) -> tuple[int, dict[str, list[float]], dict[str, Any]]:
    """Restore model and optimizers; returns the steps done, the history of losses and what else was saved.

    All ranks together, however many they are, and however many wrote the checkpoint.
    """
    state = read_json(path / "state.json")
    load_weights(model, _saved_weights(path, model), path)
    for name, optimizer in optimizers.items():
        _restore_optimizer(model, optimizer, _saved_optimizer(path, name, model, optimizer))
    return state.pop("step"), state.pop("history"), state


def _saved_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    if distributed.num_ranks() == 1:
        return load_tensors(path / "model.safetensors")
    weights = model.state_dict()
    return load_shards(path, lambda name, _: weights.get(name))


def _saved_optimizer(
    path: Path, name: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    file = path / f"{name}.safetensors"
    if distributed.num_ranks() == 1 and not any(path.glob(f"{name}-*-of-*.safetensors")):
        return load_tensors(file)
    moved = set(_names(model, optimizer).values())
    weights = {weight: tensor for weight, tensor in model.state_dict().items() if weight in moved}

    def like(key: str, shape: torch.Size) -> Tensor | None:
        """State of the shape of its weight is spread over the ranks as the weight is."""
        weight = weights.get(key.rpartition("/")[0])
        if weight is None:
            return None
        return torch.zeros_like(weight) if weight.shape == shape else weight.new_zeros(shape)

    return load_shards(path, like)
