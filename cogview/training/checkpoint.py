# SPDX-License-Identifier: Apache-2.0
"""Weights and training state on disk: safetensors and JSON only, written aside and renamed.

A training checkpoint is a folder ``step-00000400`` with ``model.safetensors``, ``optimizer.safetensors``
and ``state.json``. It appears under its name only when complete, so a kill at any moment leaves the
previous one intact. Random numbers need no saving: training derives them from (seed, step).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON aside and rename."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON. FileNotFoundError if absent, ValueError if damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"file not found: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors, aside and then renamed."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside)
    os.replace(aside, path)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file. FileNotFoundError if absent, ValueError if damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights not found: {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from None


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Copy tensors into ``model``; a wrong name or shape is one ValueError naming ``source``."""
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{source} does not hold this model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}"
        )
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"{source}: {name} must be {list(tensor.shape)}, got {list(tensors[name].shape)}; "
                "the configuration differs from that of the file"
            )
    model.load_state_dict(dict(tensors))


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def save_checkpoint(
    folder: str | os.PathLike[str],
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


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
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


def _released_model_file(path: Path) -> Path:
    """The weights inside a released folder, or the file itself."""
    if path.is_dir():
        tracker = path / "latest_checkpointed_iteration.txt"
        if not tracker.is_file():
            raise FileNotFoundError(
                f"{path} has no latest_checkpointed_iteration.txt; give the .pt file itself"
            )
        folder = path / tracker.read_text().strip()
        if (folder / "mp_rank_01_model_states.pt").exists():
            raise ValueError(
                f"{folder} is split over several model-parallel ranks; only one rank can be read"
            )
        path = folder / "mp_rank_00_model_states.pt"
    if not path.is_file():
        raise FileNotFoundError(f"weights not found: {path}")
    return path


def read_released_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """State dict of a released ``.pt`` file, transformer or image tokenizer, for :func:`load_weights`.

    Args:
        path: the file, or the folder with ``latest_checkpointed_iteration.txt``.

    The file is a pickle, so it is read by PyTorch's restricted unpickler: tensors, plain containers and
    the NumPy arrays of saved random states, no code. Anything else in it is a ValueError. A ``module.``
    prefix on the names is dropped.
    """
    path = _released_model_file(Path(path))
    reconstruct: Any = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    allowed: list[Any] = [
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        *(np.ndarray, np.dtype, type(np.dtype(np.uint32))),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds, all meaning the same to the caller
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read safely as weights: {reason}") from None
    state = content.get("module", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold a state dict")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
