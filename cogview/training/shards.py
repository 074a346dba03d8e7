# SPDX-License-Identifier: Apache-2.0
"""Tensors that are spread over ranks, in safetensors files: each rank writes and reads its own part.

The files are those of PyTorch's distributed checkpoint (DCP) in its Hugging Face format: safetensors, whose
header says where in the whole tensor a part belongs. So they can be read by another number of ranks than
wrote them, and by one process. DCP's other format is not used: it keeps that in a pickle.
A plain safetensors file is read as a single part that is whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from cogview.training import distributed


def save_shards(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` as ``name-00001-of-00004.safetensors``, ... in ``folder``. All ranks together.

    What every rank has alike is written once. OSError if a rank cannot write its part.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # of PyTorch's own use
            dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise OSError(f"{folder} cannot be written: {_reason(error)}") from None
    if distributed.is_first():
        for path in sorted(folder.glob("shard-*.safetensors")):
            shard = path.name.split("-")[1]
            path.rename(folder / f"{name}-{shard}-of-{distributed.num_ranks():05d}.safetensors")
    distributed.wait_for_all()


Like = Callable[[str, torch.Size, torch.dtype], Tensor | None]


def load_shards(folder: Path, like: Like) -> dict[str, Tensor]:
    """Read tensors of all safetensors files in ``folder``. All ranks together, or one process alone.

    Args:
        like: a tensor to read into, for a name, the shape of the whole tensor and its dtype; None leaves it
            out. A tensor that is spread over the ranks gets the parts that belong to each.

    Raises:
        ValueError: a file is damaged, or ``like`` gave a tensor of another shape.
    """
    import torch.distributed.checkpoint as dcp
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        saved = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)
        wanted = {name: like(name, entry.size, entry.properties.dtype) for name, entry in saved.items()}
        tensors = {name: tensor for name, tensor in wanted.items() if tensor is not None}
        if tensors:
            with warnings.catch_warnings():
                # PyTorch warns a process that is alone, also where it is told that it is.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(tensors, storage_reader=reader, no_dist=distributed.num_ranks() == 1)
    except CheckpointException as error:
        raise ValueError(f"{folder} cannot be read: {_reason(error)}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder} cannot be read, a file is damaged: {error}") from None
    return tensors


def _reason(error: BaseException) -> str:
    """What went wrong on the first rank that says so, without its traceback."""
    (failure, _), *_ = error.failures.values()  # type: ignore[attr-defined]
    return " ".join(str(failure).split())
