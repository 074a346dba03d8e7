# SPDX-License-Identifier: Apache-2.0
"""How much memory weights and cache take, and how many rows fit beside one another."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from cogview.config import ModelConfig

SHARE = 0.6  # of what is free, for the cache; activations and a spare copy take the rest


def weight_bytes(module: nn.Module) -> int:
    """Memory of parameters and buffers; of quantised ones, what they really take."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(_bytes(tensor) for tensor in tensors.values())


def _bytes(tensor: torch.Tensor) -> int:
    names = getattr(tensor, "tensor_data_names", None)  # what torchao's quantised tensors are made of
    if names:
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def cache_bytes(config: ModelConfig, rows: int, dtype: torch.dtype) -> int:
    """Memory of keys and values of ``rows`` rows as long as the model has positions."""
    return 2 * config.num_layers * rows * config.max_positions * config.hidden_size * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that is free on ``device`` now."""
    if device.type == "cuda":
        # What PyTorch's allocator holds without use counts as free.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def rows_that_fit(config: ModelConfig, dtype: torch.dtype, device: torch.device, at_most: int) -> int:
    """Rows whose cache fits beside what is in memory already; at least 1, at most ``at_most``."""
    fitting = int(SHARE * free_bytes(device)) // cache_bytes(config, 1, dtype)
    return max(1, min(at_most, fitting))
