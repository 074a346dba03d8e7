# SPDX-License-Identifier: Apache-2.0
"""The chunked backend: the steps of ``pieces`` in plain PyTorch, a block of rows at a time, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cogview_kernels import _checks
from cogview_kernels.linear_cross_entropy import pieces
from cogview_kernels.linear_cross_entropy.objective import Objective
from cogview_kernels.linear_cross_entropy.pieces import Piece, Tokens


def limit(backend: str, hidden: Tensor) -> str:
    """Why the steps cannot take ``hidden``; empty when they can."""
    return _checks.kernel_dtype_limit(backend, "hidden", hidden)


def reduce(piece: Piece, tokens: Tokens, objective: Objective) -> None:
    """See :class:`pieces.Steps`."""
    logit_max, total, picked, *sums = tokens.stats
    if piece.first == 0:
        for x, nothing in (
            (logit_max, -torch.inf),
            (total, 0),
            (picked, -torch.inf),
            *((x, 0) for x in sums),
        ):
            x.fill_(nothing)
    for rows, block in _blocks(piece):
        logits = objective.capped(_with_bias(block, rows, piece))
        first = piece.first + rows.start
        largest, row = logits.max(0)
        if tokens.predicted is not None:
            tokens.predicted.copy_(
                torch.where((largest > logit_max) | (first == 0), first + row, tokens.predicted)
            )
        new_max = torch.maximum(logit_max, largest)
        # No id yet: -inf minus -inf would be NaN.
        safe = new_max.masked_fill(new_max == -torch.inf, 0)
        logits -= safe
        for x in sums:
            x += logits.sum(0) + (first * (logit_max - safe) if first else 0)
        total.mul_((logit_max - safe).exp()).add_(logits.exp_().sum(0))
        logit_max.copy_(new_max)
    row, known = _row_of_target(piece.first, piece.logits, tokens)
    at_target = piece.logits[row, torch.arange(len(row), device=row.device)].float()
    if piece.bias is not None:
        at_target += piece.bias[row]
    picked.copy_(torch.where(known, objective.capped(at_target), picked))


def gradient(piece: Piece, tokens: Tokens, objective: Objective, dbias: Tensor | None) -> None:
    """See :class:`pieces.Steps`."""
    coefficient, (logit_max, total) = tokens.coefficient, tokens.stats[:2]
    factor = coefficient / total
    if objective.z_loss:
        factor = factor * (1 + 2 * objective.z_loss * (logit_max + total.log()))
    factor = torch.where(coefficient != 0, factor, 0)
    at_target = coefficient * (1 - objective.label_smoothing)
    columns = torch.arange(len(coefficient), device=coefficient.device)
    for rows, block in _blocks(piece):
        logits = objective.capped(_with_bias(block, rows, piece))
        dlogits = (logits - logit_max).exp_().mul_(factor)
        if objective.label_smoothing:
            dlogits -= coefficient * (objective.label_smoothing / piece.ids)
        row, known = _row_of_target(piece.first + rows.start, block, tokens)
        dlogits.index_put_((row, columns), torch.where(known, -at_target, 0), accumulate=True)
        if objective.softcap:
            dlogits *= 1 - (logits / objective.softcap).square()
        dlogits.masked_fill_(coefficient == 0, 0)
        block.copy_(dlogits)
        if dbias is not None:
            dbias[rows] += dlogits.sum(1)


product, adder = pieces.product, pieces.no_adder


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


def _with_bias(block: Tensor, rows: slice, piece: Piece) -> Tensor:
    """A float32 copy."""
    return block.to(torch.float32, copy=True) if piece.bias is None else block + piece.bias[rows, None]


def _row_of_target(first: int, logits: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """In which row of ``logits`` the target of each token is, 0 where in none, and whether it is in one."""
    row = tokens.target - first
    known = (row >= 0) & (row < len(logits))
    return torch.where(known, row, 0), known


def _blocks(piece: Piece) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of the logits at a time, and which."""
    v, n = piece.logits.shape
    rows = max(16, pieces.CHUNK_ELEMENTS // (16 * n))
    for start in range(0, v, rows):
        these = slice(start, min(start + rows, v))
        yield these, piece.logits[these]
