# SPDX-License-Identifier: Apache-2.0
"""Tensors into a model: the weights of a run, and those that CogView's authors released."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cogview.files import StrPath


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: StrPath) -> None:
    """Copy tensors into ``model``; a wrong name or shape is one ValueError naming ``source``.

    A model on the device ``meta`` takes the tensors themselves, so that no size is given memory unchecked.
    """
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
    if any(tensor.is_meta for tensor in expected.values()):
        taken = {name: tensors[name].to(tensor.dtype) for name, tensor in expected.items()}
        model.load_state_dict(taken, assign=True)
    else:
        model.load_state_dict(dict(tensors))


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


def read_released_weights(path: StrPath) -> dict[str, Tensor]:
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
