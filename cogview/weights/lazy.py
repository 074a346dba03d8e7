# SPDX-License-Identifier: Apache-2.0
"""Named tensors that are read one at a time, so that a conversion holds no second copy of a model."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cogview.files import StrPath, require_readable, written_aside

# The names that safetensors gives to dtypes.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and dtype that ``read`` fetches or computes anew at each call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """A tensor that is there already, for example in a mapped file."""
        plain = tensor.detach()  # A file may hold parameters, which want a gradient.
        return cls(tuple(plain.shape), plain.dtype, lambda: plain)


def open_safetensors(path: StrPath) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file. FileNotFoundError if absent, ValueError if damaged."""
    from safetensors import SafetensorError, safe_open

    path = require_readable(path, "weights")
    try:
        file = safe_open(path, framework="pt")
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {
            name: LazyTensor(
                tuple(part.get_shape()), _DTYPES[part.get_dtype()], partial(file.get_tensor, name)
            )
            for name, part in parts.items()
        }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path} has tensors of dtype {error}, which no model here has") from None


def write_safetensors(
    path: StrPath, tensors: Mapping[str, LazyTensor], on_tensor: Callable[[], object] = lambda: None
) -> None:
    """Write a safetensors file, aside and then renamed, with one tensor in memory at a time.

    The library's own ``save_file`` wants all of them at once. ``on_tensor`` is called after each.
    """
    # Wide dtypes come first, as the library orders them, so that each tensor is aligned to its own.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} has the dtype {tensor.dtype}, which no model here has")
        start, end = end, end + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written_aside(path) as aside, open(aside, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            content = tensors[name].read().contiguous().reshape(-1)
            file.write(content.view(torch.uint8).numpy().data)
            on_tensor()
