# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy in pieces: PyTorch's own matrix products, and between them a backend's two steps.

Letters: N tokens, C width, V ids in the softmax. Logits and their gradients are held with a row per id and a
column per token, ``[v, n]``, so that a piece of them fits in the memory of ``dweight``, ``[V, C]``.

FLOPs: 2 N C V for the losses; with gradients 6 N C V, and 2 (N - C) C V more where
:func:`_in_place_of_dweight` makes logits twice. Memory beyond the gradients: one piece of CHUNK_ELEMENTS and
some 30 bytes a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# 2.9 % of the logits of 8,704 tokens over 58,240 ids.
CHUNK_ELEMENTS = 14 * 2**20


class Steps(NamedTuple):
    """What a backend does to logits ``[v, n]`` (rows of any stride).

    ``reduce(logits, target, stats)`` fills ``stats`` ``[3, n]``: a token's largest logit, its sum of
    ``exp(logit - largest)``, and its target's logit, -inf where that is no id.

    ``gradient(logits, first, target, coefficient, stats)`` turns them, the ids from ``first`` on, into
    ``coefficient * (softmax - onehot(target))``, and into exact zeros where ``coefficient`` is zero.

    The other two make the logits themselves, tile by tile, and hold none: ``fused_reduce(hidden, weight,
    target, coefficient, stats)`` and ``fused_gradient(hidden, weight, first, target, coefficient, stats,
    dlogits)``.
    """

    reduce: Callable[..., None]
    gradient: Callable[..., None]
    fused_reduce: Callable[..., None] | None = None
    fused_gradient: Callable[..., None] | None = None


@dataclass
class _Problem:
    hidden: Tensor
    weight: Tensor
    target: Tensor
    coefficient: Tensor
    steps: Steps
    stats: Tensor
    scales: _Scales | None = None

    def logits(self, tokens: slice, ids: slice, out: Tensor) -> None:
        torch.mm(self.weight[ids], self.hidden[tokens].T, out=out)

    def reduce(self, tokens: slice, logits: Tensor) -> None:
        """The logits of ``tokens`` into ``logits``, what is to be known of them into ``stats``."""
        self.logits(tokens, slice(None), logits)
        self.steps.reduce(logits, self.target[tokens], self.stats[:, tokens])

    def gradient(self, tokens: slice, ids: slice, logits: Tensor, *, held: bool) -> None:
        """``dlogits`` in place of ``logits``; not ``held``, those are still to be made."""
        coefficient = self.coefficient[tokens]
        if self.scales is not None:
            coefficient = coefficient * (self.scales.dlogits if held else self.scales.for_dweight)
        known = ids.start, self.target[tokens], coefficient, self.stats[:, tokens]
        if not held and self.steps.fused_gradient is not None:
            self.steps.fused_gradient(self.hidden[tokens], self.weight[ids], *known, logits)
            return
        if not held:
            self.logits(tokens, ids, logits)
        self.steps.gradient(logits, *known)

    def dhidden(self, dlogits: Tensor, out: Tensor) -> None:
        torch.mm(dlogits.T, self.weight, out=out)

    def dweight(self, dlogits: Tensor, hidden: Tensor, out: Tensor, *, add: bool = False) -> None:
        if self.scales is not None:
            torch.addmm(out, dlogits, hidden, beta=0, alpha=self.scales.alpha, out=out)
        elif add:
            out.addmm_(dlogits, hidden)
        else:
            torch.mm(dlogits, hidden, out=out)


class _Scales(NamedTuple):
    """Factors that keep float16 gradients in its range: below 2^15 whatever the data, and large.

    ``dlogits`` are multiplied by ``dlogits`` for ``dhidden``, by ``for_dweight`` for ``dweight``, which is
    multiplied once more, by ``alpha``. The first two are powers of two on the device, for nobody to wait for.
    """

    dlogits: Tensor
    for_dweight: Tensor
    alpha: float


def _power_of_two_below(limit: int, most: int, x: Tensor) -> Tensor:
    """The largest power of two, at most ``2^most``, that keeps ``x`` below ``2^limit``."""
    low, high = torch.aminmax(x)
    exponent = torch.frexp(torch.maximum(-low, high).float()).exponent
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), (limit - exponent).clamp(max=most))


def _scales(hidden: Tensor, weight: Tensor) -> _Scales | None:
    """For coefficients of at most 1."""
    if hidden.dtype != torch.float16 or hidden.numel() == 0:
        return None
    # dhidden is at most 2 max|weight|; dweight at most N max|hidden|.
    return _Scales(
        _power_of_two_below(14, 8, weight), _power_of_two_below(18, 14, hidden), 0.125 / hidden.shape[0]
    )


def _pieces(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def _chunk(length: int, multiple: int) -> int:
    """How many rows of ``length`` elements make a chunk: a multiple of what suits a tile, if it can be."""
    return max(CHUNK_ELEMENTS // length // multiple * multiple, 16)


def linear_cross_entropy_chunked(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    vocab_range: tuple[int, int],
    gradients: bool,
    steps: Steps,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(losses, dhidden, dweight, scales)`` of the softmax over the ids of ``vocab_range``.

    ``losses`` are multiplied by ``coefficient``, in float32. With ``gradients`` the next two are those of
    ``losses.sum()``, multiplied by the two ``scales`` (ones but for float16, whose coefficients must be at
    most 1); else they are empty.
    """
    (N, C), (start, stop) = hidden.shape, vocab_range
    V = stop - start
    dhidden = hidden.new_empty(hidden.shape if gradients else 0)
    dweight = hidden.new_empty(weight.shape if gradients else 0)
    dweight[:start] = 0
    dweight[stop:] = 0
    weight, target, in_range = weight[start:stop], target - start, dweight[start:stop]
    counted = None
    if hidden.device.type == "cpu":  # elsewhere their number would cost a synchronisation
        counted = coefficient != 0
        if bool(counted.all()):
            counted = None
        else:
            hidden, target, coefficient = hidden[counted], target[counted], coefficient[counted]
    n = hidden.shape[0]
    stats = coefficient.new_empty(3, n)
    scales = _scales(hidden, weight) if gradients else None
    problem = _Problem(hidden, weight, target, coefficient, steps, stats, scales)
    part = dhidden if counted is None or not gradients else hidden.new_empty(hidden.shape)
    if n == 0:
        in_range.zero_()
    elif not gradients:
        _losses_only(problem)
    elif V * n <= CHUNK_ELEMENTS or (hidden.dtype == torch.float32 and n > C):
        _accumulated(problem, part, in_range)
    else:
        _in_place_of_dweight(problem, part, in_range)
    peak, total, picked = stats
    losses = torch.where(coefficient != 0, coefficient * (total.log() - (picked - peak)), 0)
    if counted is not None:
        losses = losses.new_zeros(N).masked_scatter_(counted, losses)
        if gradients:
            dhidden.zero_()[counted] = part
    if scales is None:
        return losses, dhidden, dweight, losses.new_ones(2)
    return losses, dhidden, dweight, torch.stack((scales.dlogits, scales.for_dweight * scales.alpha))


def _losses_only(problem: _Problem) -> None:
    hidden, V = problem.hidden, problem.weight.shape[0]
    if problem.steps.fused_reduce is not None:
        problem.steps.fused_reduce(hidden, problem.weight, problem.target, problem.coefficient, problem.stats)
        return
    # A quarter of the logits or less; products of fewer than 128 tokens would take longer.
    n = min(_chunk(V, 32), max(len(hidden) // 4, 128), len(hidden))
    chunk = hidden.new_empty(V * n)
    for tokens in _pieces(0, len(hidden), n):
        problem.reduce(tokens, chunk[: V * (tokens.stop - tokens.start)].view(V, -1))


def _accumulated(problem: _Problem, dhidden: Tensor, dweight: Tensor) -> None:
    """Chunk by chunk of tokens, ``dweight`` summed over them: exact in float32 or for a single chunk."""
    hidden, V = problem.hidden, problem.weight.shape[0]
    n = min(_chunk(V, 32), len(hidden))
    chunk = hidden.new_empty(V * n)
    for tokens in _pieces(0, len(hidden), n):
        dlogits = chunk[: V * (tokens.stop - tokens.start)].view(V, -1)
        problem.reduce(tokens, dlogits)
        problem.gradient(tokens, slice(0, V), dlogits, held=True)
        problem.dhidden(dlogits, dhidden[tokens])
        if problem.scales is not None:
            dlogits *= problem.scales.for_dweight / problem.scales.dlogits
        problem.dweight(dlogits, hidden[tokens], dweight, add=tokens.start > 0)


def _in_place_of_dweight(problem: _Problem, dhidden: Tensor, dweight: Tensor) -> None:
    """Every gradient is one product, summed in float32 inside it, and the logits lie in ``dweight`` itself.

    ``dweight`` is written last, and its memory has room for the logits of C tokens. So rounds of C tokens go
    through it: logits, softmax, ``dhidden``. What the last round leaves there is already, row by row, the
    ``dlogits`` that the same rows of ``dweight`` are made from; those of the earlier tokens are made again.
    Summed over chunks of tokens instead, ``dweight`` would need a copy in float32: twice its own memory.
    """
    hidden, V = problem.hidden, problem.weight.shape[0]
    N, C = hidden.shape
    kept = min(N, C)
    first = (N - kept) % C
    for tokens in (*_pieces(0, first, C), *_pieces(first, N, C)):
        dlogits = dweight[:, : tokens.stop - tokens.start]
        problem.reduce(tokens, dlogits)
        problem.gradient(tokens, slice(0, V), dlogits, held=True)
        problem.dhidden(dlogits, dhidden[tokens])
    # However few the tokens, 2.9 % of the logits at most: 1,664 of 58,240 ids, whose products of 128 x 256
    # fill all but two of an H200's multiprocessors. 2 % on the CPU, where PyTorch's own take memory, too.
    share = 50 if hidden.device.type == "cpu" else 34
    v = min(_chunk(N, 128), max(V // share // 128 * 128, 128), V)
    chunk = hidden.new_empty(v * N)
    for ids in _pieces(0, V, v):
        dlogits = chunk[: (ids.stop - ids.start) * N].view(-1, N)
        if kept < N:
            problem.gradient(slice(0, N - kept), ids, dlogits[:, : N - kept], held=False)
        dlogits[:, N - kept :] = dweight[ids, :kept]
        if problem.scales is not None:
            dlogits[:, N - kept :] *= problem.scales.for_dweight / problem.scales.dlogits
        problem.dweight(dlogits, hidden, dweight[ids])


# ---- the steps in eager PyTorch, a block of rows at a time


def _blocks(logits: Tensor) -> Iterator[tuple[int, Tensor]]:
    rows = max(1, CHUNK_ELEMENTS // (16 * logits.shape[1]))
    return ((i, logits[i : i + rows]) for i in range(0, logits.shape[0], rows))


def picked_logits(logits: Tensor, target: Tensor) -> Tensor:
    """The logit of each token's target, -inf where that is no id."""
    known = (target >= 0) & (target < logits.shape[0])
    columns = torch.arange(logits.shape[1], device=logits.device)
    return logits[torch.where(known, target, 0), columns].float().masked_fill(~known, -torch.inf)


def _reduce(logits: Tensor, target: Tensor, stats: Tensor) -> None:
    peak, total, picked = stats
    peak.copy_(logits.amax(0))
    total.zero_()
    for _, block in _blocks(logits):
        total += (block.float() - peak).exp_().sum(0)
    picked.copy_(picked_logits(logits, target))


def _gradient(logits: Tensor, first: int, target: Tensor, coefficient: Tensor, stats: Tensor) -> None:
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


EAGER_STEPS = Steps(_reduce, _gradient)
