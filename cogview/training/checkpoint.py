# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training: safetensors and JSON only, whole or absent.

A checkpoint is a folder ``step-00000400`` with ``model.safetensors``, a file for each optimizer
(``optimizer.safetensors`` where there is one) and ``state.json``, which has the fingerprints of the other
files. It appears under its name only when complete and on the disk, so a kill at any moment leaves the
previous one intact. Random numbers need no saving: training derives them from (seed, step).

Several ranks save the same, but for the optimizers: each rank writes its own part of their state, such as
``optimizer-00001-of-00004.safetensors``. A checkpoint of either kind is read by any number of ranks.

Only folders of exactly such a name with a ``state.json`` in them are checkpoints; one with a model that has
lost it is a damaged one. Whatever else lies beside them is the user's: it is neither read nor removed. A
damaged checkpoint is refused by name, with the way to go on from the one before; nothing falls back in
silence, since that would throw steps away.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogview.files import (
    StrPath,
    digest,
    exists,
    flush,
    load_tensors,
    read_json,
    require_readable,
    save_tensors,
    write_json,
)
from cogview.settings import build, plain
from cogview.training import distributed
from cogview.training.shards import load_shards, save_shards
from cogview.weights import load_weights

CHECKPOINTS = "checkpoints"  # of the transformer, in its run folder
MODEL = "model.safetensors"
STATE = "state.json"
_NAME = re.compile(r"step-\d{8}")
_WRITING, _REMOVING, _REPLACED = "writing.tmp", "removing.tmp", "replaced.tmp"

Optimizers = Mapping[str, torch.optim.Optimizer]


@dataclass(frozen=True)
class SavedFile:
    """What a file of a checkpoint must be, to be the one that was written."""

    bytes: int
    digest: str


@dataclass(frozen=True)
class CheckpointState:
    """``state.json`` of a checkpoint: all that is not a tensor."""

    step: int  # steps done
    history: dict[str, list]  # by name, one value for each step
    skipped_steps: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)  # ``Trainer.state()``
    origin: dict[str, str] = field(default_factory=dict)  # fingerprints of what was trained on, by name
    files: dict[str, SavedFile] | None = None  # None in checkpoints of before there were fingerprints


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Name of each parameter that ``optimizer`` moves, by the parameter's number in its state dict."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index: names[id(parameter)] for index, parameter in enumerate(parameters)}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state, names = optimizer.state_dict()["state"], _names(model, optimizer)
    return {f"{names[index]}/{key}": value for index in state for key, value in state[index].items()}


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], source: Path
) -> None:
    """The optimizer puts each tensor on the device where it wants it."""
    of_parameter: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        of_parameter.setdefault(name, {})[key] = tensor
    names = _names(model, optimizer)
    unknown = sorted(of_parameter.keys() - set(names.values()))
    if unknown:
        raise ValueError(f"{source} is of another model: it has a state of {unknown[0]}")
    state = {index: of_parameter[name] for index, name in names.items() if name in of_parameter}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    folder: StrPath, state: CheckpointState, model: nn.Module, optimizers: Optimizers, *, keep: int
) -> Path:
    """Save the state after ``state.step`` steps as ``folder/step-...``; of all such, keep the last ``keep``.

    All ranks together. The first one needs room for all weights in its host memory.
    OSError, such as for a full disk, leaves the earlier checkpoints as they were, and nothing half-written.
    """
    folder = Path(folder)
    final = folder / f"step-{state.step:08d}"
    aside = folder / _WRITING
    first = distributed.is_first()
    try:
        if first:
            _remove_leftovers(folder)
            aside.mkdir(parents=True)
        distributed.wait_for_all()
        weights = distributed.gathered_on_first(model.state_dict())
        for name, optimizer in optimizers.items():
            _save_optimizer(aside, name, _optimizer_tensors(model, optimizer))
        if first:
            save_tensors(aside / MODEL, weights)
            complete_checkpoint(aside, state)
            _put_in_place(aside, final)
    except OSError as error:
        raise OSError(f"{final} cannot be saved: {error}; {_what_remains(folder)}") from None
    finally:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
    for old in checkpoints(folder)[:-keep] if first else ():
        _remove(old)
    distributed.wait_for_all()
    return final


def _save_optimizer(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    if distributed.num_ranks() > 1:
        save_shards(folder, name, tensors)
    else:
        save_tensors(folder / f"{name}.safetensors", tensors)


def complete_checkpoint(folder: Path, state: CheckpointState) -> None:
    """Write ``state.json``, with the fingerprints of all other files of the checkpoint, which are there."""
    files = {path.name: SavedFile(path.stat().st_size, digest(path)) for path in sorted(folder.iterdir())}
    content = {**plain(state), "files": plain(files)}
    write_json(folder / STATE, content)


def _put_in_place(aside: Path, final: Path) -> None:
    is_ours = exists(final / STATE)
    replaced = final.with_name(_REPLACED if is_ours else f"{final.name}.before")
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, replaced)
    os.rename(aside, final)
    flush(final.parent)
    if is_ours:
        shutil.rmtree(replaced, ignore_errors=True)


def _remove(path: Path) -> None:
    """A kill in the middle leaves nothing that has a checkpoint's name."""
    removing = path.with_name(_REMOVING)
    shutil.rmtree(removing, ignore_errors=True)
    os.rename(path, removing)
    shutil.rmtree(removing, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for name in (_WRITING, _REMOVING, _REPLACED):
        shutil.rmtree(folder / name, ignore_errors=True)


def _what_remains(folder: Path) -> str:
    found = checkpoints(folder)
    if not found:
        return "once that is mended, the same command begins again"
    return f"{found[-1].name} is whole: once that is mended, the same command goes on from there"


def checkpoints(folder: StrPath) -> list[Path]:
    """The checkpoints in ``folder``, that with the fewest steps first."""
    if not exists(folder):
        return []
    named = sorted(path for path in Path(folder).iterdir() if _NAME.fullmatch(path.name))
    return [path for path in named if exists(path / STATE)]


def latest_checkpoint(folder: StrPath) -> Path | None:
    """The checkpoint with the most steps in ``folder``, if there is one.

    ValueError where a later one has lost its ``state.json``: to pass over it would throw steps away.
    """
    found = checkpoints(folder)
    for path in sorted(Path(folder).iterdir()) if exists(folder) else ():
        later = _NAME.fullmatch(path.name) and (not found or path > found[-1])
        if later and exists(path / MODEL):
            raise _refusal(path, f"{STATE} is missing")
    return found[-1] if found else None


def require_checkpoint(folder: StrPath, hint: str) -> Path:
    """The latest checkpoint in a ``folder`` of a run; FileNotFoundError with the ``hint`` without one."""
    found = latest_checkpoint(folder)
    if found is None:
        raise FileNotFoundError(f"{Path(folder).parent} has no checkpoint yet; {hint}")
    return found


def load_model(path: Path, model: nn.Module) -> None:
    """The weights of a checkpoint into ``model``, whatever their dtype. Raises as :func:`load_checkpoint`."""
    load_weights(model, verified_tensors(path, MODEL, read_state(path)), path / MODEL)


def read_state(path: Path) -> CheckpointState:
    """``state.json`` of a checkpoint. ValueError that names what is wrong with it and the way out."""
    try:
        state = build(CheckpointState, read_json(path / STATE))
    except (TypeError, ValueError) as error:
        raise _refusal(path, f"{STATE} is damaged, or of another version: {error}") from None
    if state.step != int(path.name.removeprefix("step-")):
        raise _refusal(path, f"{STATE} is that of step {state.step}")
    for name, values in state.history.items():
        numbers = all(isinstance(value, (int, float)) for value in values)
        if not numbers or len(values) != state.step:
            reason = f"the history of {name} must be {state.step} numbers, and is not"
            raise _refusal(path, f"{STATE} is damaged: {reason}")
    return state


def fingerprint_weights(path: Path) -> str:
    """What tells the model's weights of a checkpoint from others, wherever the run lies."""
    files = read_state(path).files
    return digest(path / MODEL) if files is None else files[MODEL].digest


_CHANGED = {
    "clip": "the CLIP is not the one that {run} was trained with: give that one, or train in another folder",
    "data": "the pictures or captions are not those that {run} was started with: put them back to go on with "
    "it, or train in another folder. Pictures and rows that were written of them are not the same data",
    "start": "the run that {run} was finetuned from has other weights now: put them back to go on with it, "
    "or finetune in another folder",
    "tokenizers": "the tokenizers in {run} are not those that its transformer was trained with: put them "
    "back, or train the transformer in another folder",
}


def check_resumable(path: Path, origin: Mapping[str, str]) -> None:
    """What can be told at once of whether a training on ``origin`` can go on from a checkpoint.

    The rest is found when the files are read. ValueError as for :func:`load_checkpoint` or
    :func:`check_origin`.
    """
    state = read_state(path)
    for name in state.files or ():
        _check_size(path, name, state)
    check_origin(path, origin)


def check_origin(path: Path, origin: Mapping[str, str]) -> None:
    """ValueError unless the checkpoint was trained on what has these fingerprints, as far as it knows.

    Where the data lie is of no concern, nor where the run folder does.
    """
    saved = read_state(path).origin
    for name, fingerprint in origin.items():
        if saved.get(name, fingerprint) != fingerprint:
            raise ValueError(_CHANGED[name].format(run=path.parent.parent))


def load_checkpoint(path: Path, model: nn.Module, optimizers: Optimizers) -> CheckpointState:
    """Restore model and optimizers; returns the rest. All ranks together, whatever number of them saved it.

    ValueError if a file is not the one that was written, or is of another model. It names the file and the
    way to go on from the checkpoint before.
    """
    state = read_state(path)
    if distributed.num_ranks() > 1:
        _verify_together(path, state)
        weights = model.state_dict()
        load_weights(model, load_shards(path, lambda name, *_: weights.get(name)), path)
    else:
        load_weights(model, verified_tensors(path, MODEL, state), path)
    for name, optimizer in optimizers.items():
        tensors = _saved_optimizer(path, name, state, model, optimizer)
        if not tensors and state.files is None:  # Nothing tells that it was written so.
            raise _refusal(path, f"{name}.safetensors is empty")
        _restore_optimizer(model, optimizer, tensors, path / f"{name}.safetensors")
    return state


def _verify_together(path: Path, state: CheckpointState) -> None:
    """Every rank verifies its share of the files; what one of them refuses, all do."""
    reason = ""
    try:
        for name in sorted(state.files or ())[distributed.rank() :: distributed.num_ranks()]:
            _verify(path, name, state)
    except (ValueError, OSError) as error:
        reason = str(error)
    reasons = [reason for reason in distributed.of_all_ranks(reason) if reason]
    if reasons:
        raise ValueError(reasons[0])


def _saved_optimizer(
    path: Path, name: str, state: CheckpointState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The state of an optimizer, which one process saved or several, for one process or for this rank."""
    shards = [file for file in state.files or () if re.fullmatch(rf"{name}-\d+-of-\d+\.safetensors", file)]
    if distributed.num_ranks() == 1 and not shards:
        return verified_tensors(path, f"{name}.safetensors", state)
    if distributed.num_ranks() == 1:
        for shard in shards:
            _verify(path, shard, state)
    moved = set(_names(model, optimizer).values())
    weights = {weight: tensor for weight, tensor in model.state_dict().items() if weight in moved}

    def like(key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """State of the shape of its weight is spread over the ranks as the weight is."""
        weight = weights.get(key.rpartition("/")[0])
        if weight is None:
            return None
        return torch.zeros_like(weight) if weight.shape == shape else torch.zeros(shape, dtype=dtype)

    return load_shards(path, like)


def verified_tensors(path: Path, name: str, state: CheckpointState) -> dict[str, Tensor]:
    """The tensors of a file of a checkpoint. ValueError unless it is the file that was written with it."""
    _verify(path, name, state)
    try:
        return load_tensors(path / name)
    except ValueError as error:
        raise _refusal(path, str(error)) from None


def _verify(path: Path, name: str, state: CheckpointState) -> None:
    file = path / name
    _check_size(path, name, state)
    require_readable(file, "weights")
    if state.files is not None and digest(file) != state.files[name].digest:
        raise _refusal(path, f"{name} is not the file that was saved with it")


def _check_size(path: Path, name: str, state: CheckpointState) -> None:
    """ValueError if a file of a checkpoint is not there, or not whole, as far as its size tells."""
    if not exists(path / name):
        raise _refusal(path, f"{name} is missing")
    if state.files is not None:
        if name not in state.files:
            raise _refusal(path, f"{STATE} does not know {name}")
        size = (path / name).stat().st_size
        if size != state.files[name].bytes:
            raise _refusal(path, f"{name} has {size} of {state.files[name].bytes} bytes")


def _refusal(path: Path, reason: str) -> ValueError:
    """A ValueError with the reason against a checkpoint, and how to go on without it."""
    before = [other for other in checkpoints(path.parent) if other < path]
    if before:
        move = shlex.join(["mv", str(path), f"{path}.damaged"])
        way_out = f"to go on from the checkpoint before, {before[-1].name}, move this one away: {move}"
    else:
        way_out = "there is none before it; train again, in another folder"
    return ValueError(f"the checkpoint {path} is damaged: {reason}; {way_out}")
