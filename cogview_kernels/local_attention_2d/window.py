# SPDX-License-Identifier: Apache-2.0
"""Which keys of a grid a query sees, and what all backends are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Keys stand on a grid of ``height`` rows by ``width`` cells in raster order, queries on a grid that is
    ``query_scale`` times finer each way. The window of a query has ``kernel_height`` rows and
    ``kernel_width`` columns (both odd), is centred at the query's cell and cut at the border."""

    height: int
    width: int
    kernel_height: int
    kernel_width: int
    query_scale: int
    causal: bool

    @property
    def queries(self) -> int:
        return self.height * self.width * self.query_scale**2

    @property
    def keys(self) -> int:
        return self.height * self.width

    @property
    def row_radius(self) -> int:
        """How many rows before its own a query sees; also after its own, unless causal."""
        return min(self.kernel_height // 2, self.height)

    @property
    def column_radius(self) -> int:
        return min(self.kernel_width // 2, self.width)

    @property
    def pairs(self) -> int:
        """How many pairs of a query and a key of the grid are seen."""
        rows, columns = self.row_radius, self.column_radius
        above, before = (
            sum(min(i, radius) for i in range(size))
            for size, radius in ((self.height, rows), (self.width, columns))
        )
        # By symmetry as many cells of a line lie after a cell, within its window, as lie before.
        seen_columns = self.width + 2 * before
        if self.causal:
            seen = above * seen_columns + self.height * (self.width + before)
        else:
            seen = (self.height + 2 * above) * seen_columns
        return seen * self.query_scale**2

    def key_rows(self, first: int, stop: int) -> tuple[int, int]:
        """The first row and the end of the rows of keys that queries of the cells' rows [first, stop) see."""
        after = 0 if self.causal else self.row_radius
        return max(0, first - self.row_radius), min(self.height, stop + after)

    def dense_mask(
        self,
        device: torch.device,
        cell_rows: tuple[int, int] | None = None,
        key_rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """Boolean ``[queries, keys]``: which keys each query sees. With ``cell_rows`` and ``key_rows`` only
        the queries whose cells lie in these rows, and the keys of these rows."""
        s = self.query_scale
        first, stop = cell_rows or (0, self.height)
        y = torch.arange(first * s, stop * s, device=device)[:, None, None, None] // s
        x = torch.arange(self.width * s, device=device)[:, None, None] // s
        row = torch.arange(*(key_rows or (0, self.height)), device=device)[:, None]
        column = torch.arange(self.width, device=device)
        seen = ((row - y).abs() <= self.row_radius) & ((column - x).abs() <= self.column_radius)
        if self.causal:
            seen = seen & ((row < y) | ((row == y) & (column <= x)))
        return seen.flatten(2, 3).flatten(0, 1)


class Keys(NamedTuple):
    """Those of the grid, ``[B, Hkv, height * width, D]``, and the extra ones, ``[B, Hkv, E, D]``, of which
    ``extra_mask`` ``[B, E]`` (None: all) says which are seen. E may be 0."""

    k: Tensor
    v: Tensor
    extra_k: Tensor
    extra_v: Tensor
    extra_mask: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Keys:
        """With ``function`` applied to keys and values."""
        k, v, extra_k, extra_v = map(function, self[:4])
        return Keys(k, v, extra_k, extra_v, self.extra_mask)
