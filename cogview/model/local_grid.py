# SPDX-License-Identifier: Apache-2.0
"""CogView2's attention for super-resolution: a fine grid sees windows of its own and of a coarse one.

Source: CogView2, arXiv:2204.14217, section 3.2. Its direct super-resolution merges a window of 9 by 5 codes
on the fine grid with one of 5 by 5 on the coarse grid; its iterative one has the 9 by 5 and all text. Here a
code sees all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from cogview.model.causal_attention import causal_attention
from cogview_kernels import local_attention_2d, merge_attention

OWN_WINDOW = (9, 5)
COARSE_WINDOW = (5, 5)


@dataclass(frozen=True)
class LocalGrid:
    """A row of ``[two tokens, low by low codes, text, 2 low by 2 low codes]``, and what each token sees.

    Tokens before the fine grid see those before them. A code of the fine grid sees the windows around its
    place on both grids, to all sides, and the text.
    """

    low: int  # side of the coarse grid
    prefix: int  # tokens before the fine grid
    first: int = 2  # the place of the first coarse code

    @property
    def text(self) -> slice:
        """What stands between the grids."""
        return slice(self.first + self.low**2, self.prefix)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Attention ``[B, H, T, D]`` of the tokens of such rows among themselves."""
        prefix, fine = slice(self.prefix), slice(self.prefix, None)
        coarse = slice(self.first, self.first + self.low**2)
        before = causal_attention(q[:, :, prefix], k[:, :, prefix], v[:, :, prefix], dropout_p)
        side = 2 * self.low
        own = local_attention_2d(
            q[:, :, fine],
            k[:, :, fine],
            v[:, :, fine],
            grid=(side, side),
            kernel_size=OWN_WINDOW,
            dropout_p=dropout_p,
            return_lse=True,
        )
        far = local_attention_2d(
            q[:, :, fine],
            k[:, :, coarse],
            v[:, :, coarse],
            grid=(self.low, self.low),
            kernel_size=COARSE_WINDOW,
            query_scale=2,
            extra_k=k[:, :, self.text],
            extra_v=v[:, :, self.text],
            dropout_p=dropout_p,
            return_lse=True,
        )
        outputs, lses = zip(own, far, strict=True)
        return torch.cat([before, cast(Tensor, merge_attention(outputs, lses))], dim=2)

    def positions(self) -> Tensor:
        """Ids of positions ``[prefix + 4 low^2]``: a fine code has that of the coarse one under it.

        CogView2's own table for the fine grid begins so.
        """
        x = torch.arange(2 * self.low, device="cpu") // 2
        y = x[:, None]
        return torch.cat([torch.arange(self.prefix, device="cpu"), (self.first + y * self.low + x).flatten()])
