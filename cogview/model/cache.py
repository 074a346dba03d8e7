# SPDX-License-Identifier: Apache-2.0
"""A key-value cache of fixed shape: one buffer for all layers, filled row by row."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values ``[L, B, H, S, D]`` and how many are valid in each row.

    ``lengths`` (int64 ``[B]``) lives on the device, so a decoding step never waits for the host. Rows
    may have different lengths: prompts are padded at the end, ``set_lengths`` gives the true lengths,
    and later tokens overwrite the padding.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        capacity: int,
        head_size: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (num_layers, batch, num_heads, capacity, head_size)
        # Zeros, not empty: masked keys still enter a product, and NaN times zero is NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int64)
        self.is_empty = True

    @property
    def capacity(self) -> int:
        """Tokens that fit in a row."""
        return self.keys.shape[3]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put ``k``, ``v`` (``[B, H, T, D]``) behind what the rows hold; ``advance`` makes them count."""
        T = k.shape[2]
        if self.is_empty:
            if self.capacity < T:
                raise ValueError(f"the cache holds {self.capacity} tokens per row, got {T}")
            self.keys[layer, :, :, :T] = k
            self.values[layer, :, :, :T] = v
            return
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        slots = self.lengths[:, None] + torch.arange(T, device=k.device)
        self.keys[layer].transpose(1, 2)[rows, slots] = k.transpose(1, 2)
        self.values[layer].transpose(1, 2)[rows, slots] = v.transpose(1, 2)

    def advance(self, count: int) -> None:
        """Count ``count`` more tokens as valid in every row."""
        self.lengths += count
        self.is_empty = False

    def set_lengths(self, lengths: Tensor) -> None:
        """After a padded prefill: the true number of tokens of each row."""
        self.lengths = lengths.to(self.lengths)

    def repeat(self, count: int) -> KVCache:
        """A new cache with every row ``count`` times in sequence: one prefill, many candidates."""
        copy = object.__new__(KVCache)
        copy.keys = self.keys.repeat_interleave(count, dim=1)
        copy.values = self.values.repeat_interleave(count, dim=1)
        copy.lengths = self.lengths.repeat_interleave(count)
        copy.is_empty = self.is_empty
        return copy
