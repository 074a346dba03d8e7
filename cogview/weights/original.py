# SPDX-License-Identifier: Apache-2.0
"""Weights in the original's format, for its own programs. :mod:`cogview.weights.released` has the layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cogview.files import StrPath, folder_written_aside, write_text, written_aside
from cogview.progress import Progress
from cogview.weights.lazy import LazyTensor
from cogview.weights.model_parallel import part_of, split_of
from cogview.weights.released import TRACKERS, WORD_EMBEDDINGS, Weights

ROWS_MULTIPLE = 128  # Each rank's part of the vocabulary has a multiple of this many rows.


def pad_rows(tensor: Tensor, multiple: int) -> Tensor:
    """The word embeddings with rows up to a multiple; the new ones repeat the last, which no token uses.

    A row of zeros would give the unused tokens a higher probability than training has left them.
    """
    missing = -len(tensor) % multiple
    return torch.cat([tensor, tensor[-1:].expand(missing, -1)]) if missing else tensor


def write_original(path: StrPath, weights: Weights, ranks: int = 1, *, progress: bool = True) -> None:
    """Write weights as the original keeps them, aside and then renamed.

    An image tokenizer is one file ``path``. A transformer is a folder with the tracker file and
    ``mp_rank_XX_model_states.pt`` of ``ranks`` model-parallel ranks, which must divide its heads. One
    rank's part of the tensors is in memory at a time, or none for one rank from files that are mapped.
    """
    if weights.kind == "image tokenizer":
        with written_aside(path) as aside:
            _save({name: _own(tensor.read()) for name, tensor in weights.tensors.items()}, aside)
        return
    iteration = str(weights.iteration or "release")  # The original takes no iteration 0.
    with (
        folder_written_aside(path) as folder,
        Progress(ranks * len(weights.tensors), "convert", unit="tensor", enabled=progress) as bar,
    ):
        (folder / iteration).mkdir()
        for rank in range(ranks):
            # Nothing but the call holds the module, so it is freed before that of the next rank is made.
            _save(
                {"module": _rank_module(weights, rank, ranks, bar), "iteration": weights.iteration or 0},
                folder / iteration / f"mp_rank_{rank:02d}_model_states.pt",
            )
        write_text(folder / TRACKERS[0], iteration)


def _save(content: object, path: Path) -> None:
    """``torch.save``, whose writer reports a full disk as a RuntimeError."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written, is the disk full? {error}") from None


def _rank_module(weights: Weights, rank: int, ranks: int, bar: Progress) -> dict[str, Tensor]:
    module = {}
    for name, tensor in weights.tensors.items():
        module[name] = _rank_tensor(name, tensor, rank, ranks)
        bar.update()
    return module


def _rank_tensor(name: str, tensor: LazyTensor, rank: int, ranks: int) -> Tensor:
    whole = tensor.read()
    if name == WORD_EMBEDDINGS:
        whole = pad_rows(whole, ROWS_MULTIPLE * ranks)
    return _own(part_of(whole, split_of(name), rank, ranks))


def _own(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own: ``torch.save`` writes the whole storage of a view."""
    is_own = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_own else tensor.clone(memory_format=torch.contiguous_format)
