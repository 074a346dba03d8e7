# SPDX-License-Identifier: Apache-2.0
"""How Megatron's model parallelism divides the transformer's tensors among N ranks, and back.

============================================  ==========  =========================================
tensors                                       split       what rank r has
============================================  ==========  =========================================
word embeddings, first half of the MLP        ``ROWS``    the r-th of N equal parts of the rows
projection to query, key and value            ``THIRDS``  the r-th part of each of the three, stacked
weights of the projections back to the trunk  ``COLUMNS`` the r-th of N equal parts of the columns
everything else                               ``WHOLE``   all of it
============================================  ==========  =========================================
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

import torch
from torch import Tensor

from cogview.weights.lazy import LazyTensor


class Split(Enum):
    """See the table of this module."""

    WHOLE = auto()
    ROWS = auto()
    THIRDS = auto()
    COLUMNS = auto()


def split_of(name: str) -> Split:
    """How the tensor called ``name`` is divided."""
    if ".query_key_value." in name:
        return Split.THIRDS
    if ".dense_h_to_4h." in name or name == "word_embeddings.weight":
        return Split.ROWS
    if name.endswith((".attention.dense.weight", ".dense_4h_to_h.weight")):
        return Split.COLUMNS
    return Split.WHOLE


def merge(parts: Sequence[LazyTensor], split: Split) -> LazyTensor:
    """The whole tensor from the parts of all ranks, in order; all parts have one shape."""
    first = parts[0]
    if split is Split.WHOLE or len(parts) == 1:
        return first
    axis = 1 if split is Split.COLUMNS else 0
    shape = list(first.shape)
    shape[axis] *= len(parts)

    def read() -> Tensor:
        tensors = [part.read() for part in parts]
        if split is not Split.THIRDS:
            return torch.cat(tensors, axis)
        thirds = zip(*(tensor.chunk(3) for tensor in tensors), strict=True)
        return torch.cat([part for third in thirds for part in third])

    return LazyTensor(tuple(shape), first.dtype, read)


def part_of(tensor: Tensor, split: Split, rank: int, ranks: int) -> Tensor:
    """What ``rank`` of ``ranks`` has of a tensor; the ranks must divide the axis."""
    if split is Split.WHOLE or ranks == 1:
        return tensor
    if split is Split.THIRDS:
        return torch.cat([third.chunk(ranks)[rank] for third in tensor.chunk(3)])
    return tensor.chunk(ranks, 1 if split is Split.COLUMNS else 0)[rank]
