# SPDX-License-Identifier: Apache-2.0
"""The chunked backend: the steps of ``pieces`` in plain PyTorch, a block of rows at a time, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cogview_kernels import _checks
from cogview_kernels.linear_cross_entropy import pieces


def limit(backend: str, hidden: Tensor) -> str:
    """Why the steps cannot take ``hidden``; empty when they can."""
    return _checks.kernel_dtype_limit(backend, "hidden", hidden)


def picked_logits(logits: Tensor, target: Tensor) -> Tensor:
    """The logit of each token's target, -inf where that is no id."""
    known = (target >= 0) & (target < logits.shape[0])
    columns = torch.arange(logits.shape[1], device=logits.device)
    return logits[torch.where(known, target, 0), columns].float().masked_fill(~known, -torch.inf)


def reduce(logits: Tensor, target: Tensor, stats: Tensor) -> None:
    """See :class:`pieces.Steps`."""
    logit_max, total, picked = stats
    logit_max.copy_(logits.amax(0))
    total.zero_()
    for _, block in _blocks(logits):
        total += (block.float() - logit_max).exp_().sum(0)
    picked.copy_(picked_logits(logits, target))


def gradient(logits: Tensor, first: int, target: Tensor, coefficient: Tensor, stats: Tensor) -> None:
    """See :class:`pieces.Steps`."""
    factor = torch.where(coefficient != 0, coefficient / stats[1], 0)
    columns = torch.arange(logits.shape[1], device=logits.device)
    for start, block in _blocks(logits):
        dlogits = block.float().sub_(stats[0]).exp_().mul_(factor)
        row = target - (first + start)
        known = (row >= 0) & (row < len(block))
        dlogits.index_put_(
            (torch.where(known, row, 0), columns), torch.where(known, -coefficient, 0), accumulate=True
        )
        block.copy_(dlogits.masked_fill_(coefficient == 0, 0))


def scale(gradient: Tensor, factor: Tensor) -> None:
    """See :class:`pieces.Steps`."""
    rows = len(gradient)
    if gradient.device.type == "cpu":
        if factor == 1:
            return
        # PyTorch widens the operand and the result here, 8 bytes an element, so a few rows go at a time.
        rows = pieces.CHUNK_ELEMENTS // (4 * gradient.shape[1])
    for part in gradient.split(max(1, rows)):
        # The factor gets one dimension: PyTorch would round one of none to the dtype of the gradient first.
        torch.mul(part, factor.view(1), out=part)


def _blocks(logits: Tensor) -> Iterator[tuple[int, Tensor]]:
    rows = max(1, pieces.CHUNK_ELEMENTS // (16 * logits.shape[1]))
    return ((i, logits[i : i + rows]) for i in range(0, logits.shape[0], rows))
