# SPDX-License-Identifier: Apache-2.0
"""A key-value cache of fixed shape: one buffer for all layers, filled row by row."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cogview_kernels import _cache


class KVCache:
    """Keys and values ``[L, 2, B, H, S, D]`` and how many are valid in each row.

    ``lengths`` (int64 ``[B]``) lives on the device, so a decoding step never waits for the host. No tensor
    is ever replaced, only written to, so that a captured CUDA graph stays valid. Rows may have different
    lengths: prompts are padded at the end, ``set_lengths`` gives the true lengths, and later tokens
    overwrite the padding. ``restart`` (int64 ``[B, 1]``) is the place of each row at which the ids of
    positions begin at 0 again, if there is one.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        num_heads: int,
        capacity: int,
        head_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (num_layers, 2, batch, num_heads, capacity, head_size)
        # Zeros, not empty: masked keys still enter a product, and NaN times zero is NaN.
        self.buffer = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int64)
        self.restart: Tensor | None = None
        self.is_empty = True

    @functools.cached_property
    def _layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By layer, so that a step does not take the buffer apart again: ``[B, H, S, D]`` twice, and the two
        together with the dimensions in the order in which a projection has them, ``[B, S, 2, H, D]``."""
        return [(layer[0], layer[1], layer.permute(1, 3, 0, 2, 4)) for layer in self.buffer]

    @functools.cached_property
    def _rows(self) -> Tensor:
        return torch.arange(self.buffer.shape[2], device=self.buffer.device)[:, None]

    @property
    def capacity(self) -> int:
        """Tokens that fit in a row."""
        return self.buffer.shape[4]

    def places(self, count: int) -> Tensor:
        """Where ``count`` new tokens of every row are to stand, int64 ``[B, count]``."""
        places = self.lengths.unsqueeze(1)
        return places if count == 1 else places + torch.arange(count, device=self.lengths.device)

    def begin(self, count: int) -> Tensor:
        """Before ``count`` new tokens of every row go through the layers one by one: their places.

        ValueError if they cannot fit.
        """
        if self.is_empty and self.capacity < count:
            raise ValueError(f"the cache holds {self.capacity} tokens per row, got {count}")
        self._slots = self.places(count)
        self.lengths_after = self.lengths + count
        return self._slots

    def positions(self, places: Tensor) -> Tensor:
        """The ids of positions at places ``[B, T]`` of the rows."""
        if self.restart is None:
            return places
        return torch.where(places >= self.restart, places - self.restart, places)

    def write(self, layer: int, keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
        """Put ``[B, T, 2, H, D]`` behind what the rows hold; ``advance`` makes them count.

        Returns the keys and the values of the layer, each ``[B, H, S, D]``.
        """
        keys, values, both = self._layers[layer]
        if self.is_empty:
            both[:, : keys_and_values.shape[1]] = keys_and_values
        elif _cache.can_write(both, keys_and_values):
            _cache.write(both, keys_and_values, self._slots)
        else:
            both[self._rows, self._slots] = keys_and_values.to(both.dtype)  # autocast has dtypes of its own
        return keys, values

    def advance(self, count: int) -> None:
        """Count ``count`` more tokens as valid in every row."""
        self.lengths += count
        self.is_empty = False

    def set_lengths(self, lengths: Tensor) -> None:
        """After a padded prefill: the true number of tokens of each row."""
        self.lengths.copy_(lengths)

    def take(self, rows: Sequence[int], capacity: int) -> KVCache:
        """A new cache of these rows, in this order and as often as named: one prefill, many candidates.

        ValueError if ``capacity`` is below that of this cache.
        """
        if capacity < self.capacity:
            raise ValueError(f"capacity must be at least {self.capacity}, got {capacity}")
        layers, _, _, heads, _, head_size = self.buffer.shape
        copy = KVCache(
            num_layers=layers,
            batch=len(rows),
            num_heads=heads,
            capacity=capacity,
            head_size=head_size,
            device=self.buffer.device,
            dtype=self.buffer.dtype,
        )
        index = torch.tensor(rows, device=self.buffer.device)
        copy.buffer[:, :, :, :, : self.capacity] = self.buffer.index_select(2, index)
        copy.lengths.copy_(self.lengths[index])
        copy.restart = None if self.restart is None else self.restart[index]
        copy.is_empty = self.is_empty
        return copy

    def reorder(self, rows: Tensor, first: int = 0) -> None:
        """Row i becomes what row ``rows[i]`` was, in place. Before position ``first`` they must be alike."""
        self.buffer[:, :, :, :, first:] = self.buffer[:, :, :, :, first:].index_select(2, rows)
        self.lengths.copy_(self.lengths[rows])
        if self.restart is not None:
            self.restart.copy_(self.restart[rows])
