# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy in pieces: PyTorch's own matrix products, and between them the steps of a backend.

Letters: N tokens, C width, V ids in the softmax. Logits and their gradients are held with a row per id and a
column per token, ``[v, n]``, so that a piece of them fits in the memory of ``dweight``, ``[V, C]``.

FLOPs: 2 N C V for the losses; with gradients 6 N C V, and 2 (N - C) C V more where
:func:`_in_place_of_dweight` makes logits twice. Memory beyond the gradients: one piece of CHUNK_ELEMENTS and
some 30 bytes a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# 2.9 % of the logits of 8,704 tokens over 58,240 ids.
CHUNK_ELEMENTS = 14 * 2**20


class Steps(Protocol):
    """What a backend, a module, does to logits ``[v, n]`` (rows of any stride) and to gradients."""

    def limit(self, backend: str, hidden: Tensor) -> str:
        """Why it cannot take ``hidden``; empty when it can."""

    def reduce(self, logits: Tensor, target: Tensor, stats: Tensor) -> None:
        """Fills ``stats`` ``[3, n]``: a token's largest logit, its sum of ``exp(logit - largest)``, and the
        logit of its target, -inf where that is no id."""

    def gradient(
        self, logits: Tensor, first: int, target: Tensor, coefficient: Tensor, stats: Tensor
    ) -> None:
        """Turns ``logits`` of the ids from ``first`` on into ``coefficient * (softmax - onehot(target))``:
        exact zeros where ``coefficient`` is zero."""

    def scale(self, gradient: Tensor, factor: Tensor) -> None:
        """``gradient *= factor``, a scalar, multiplied in float32 and rounded once, with no float32 copy."""


class Result(NamedTuple):
    """``losses`` ``[N]`` in float32: of each token, 0 where its coefficient is zero.

    With gradients the next two are those of ``(coefficient * losses).sum()``, multiplied by the two
    ``scales`` (ones but for float16); else they are empty.
    """

    losses: Tensor
    dhidden: Tensor
    dweight: Tensor
    scales: Tensor


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
        """Makes the logits of ``tokens`` in ``logits``, and their ``stats``."""
        self.logits(tokens, slice(None), logits)
        self.steps.reduce(logits, self.target[tokens], self.stats[:, tokens])

    def gradient(self, tokens: slice, ids: slice, logits: Tensor, factor: Tensor | None) -> None:
        """The gradients of the logits in their place; ``factor``, if any, multiplies the coefficients."""
        coefficient = self.coefficient[tokens]
        if factor is not None:
            coefficient = coefficient * factor
        self.steps.gradient(logits, ids.start, self.target[tokens], coefficient, self.stats[:, tokens])

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

    The gradients of the logits are multiplied by ``for_dhidden`` on their way to ``dhidden``, by
    ``for_dweight`` on their way to ``dweight``, and ``dweight`` by ``alpha`` besides. The first two factors
    are powers of two that lie on the device, so that nobody waits to know them.
    """

    for_dhidden: Tensor
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


def linear_cross_entropy_in_pieces(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    vocab_range: tuple[int, int],
    gradients: bool,
    steps: Steps,
) -> Result:
    """The losses of the softmax over the ids of ``vocab_range``, and with ``gradients`` those.

    The coefficients of float16 gradients must be at most 1.
    """
    (N, C), (start, stop) = hidden.shape, vocab_range
    V = stop - start
    dhidden = hidden.new_empty(hidden.shape if gradients else 0)
    dweight = hidden.new_empty(weight.shape if gradients else 0)
    in_range = dweight
    if len(weight) > V:
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
    logit_max, total, picked = stats
    losses = torch.where(coefficient != 0, total.log() - (picked - logit_max), 0)
    if counted is not None:
        losses = losses.new_zeros(N).masked_scatter_(counted, losses)
        if gradients:
            dhidden.zero_()[counted] = part
    if scales is None:
        return Result(losses, dhidden, dweight, losses.new_ones(2))
    return Result(
        losses, dhidden, dweight, torch.stack((scales.for_dhidden, scales.for_dweight * scales.alpha))
    )


def _losses_only(problem: _Problem) -> None:
    hidden, V = problem.hidden, problem.weight.shape[0]
    # A quarter of the logits or less; products of fewer than 128 tokens would take longer.
    n = min(_chunk(V, 32), max(len(hidden) // 4, 128), len(hidden))
    chunk = hidden.new_empty(V * n)
    for tokens in _pieces(0, len(hidden), n):
        problem.reduce(tokens, chunk[: V * (tokens.stop - tokens.start)].view(V, -1))


def _accumulated(problem: _Problem, dhidden: Tensor, dweight: Tensor) -> None:
    """Chunk by chunk of tokens, ``dweight`` summed over them: exact in float32 or for a single chunk."""
    hidden, V, scales = problem.hidden, problem.weight.shape[0], problem.scales
    n = min(_chunk(V, 32), len(hidden))
    chunk = hidden.new_empty(V * n)
    for tokens in _pieces(0, len(hidden), n):
        dlogits = chunk[: V * (tokens.stop - tokens.start)].view(V, -1)
        problem.reduce(tokens, dlogits)
        problem.gradient(tokens, slice(0, V), dlogits, scales and scales.for_dhidden)
        problem.dhidden(dlogits, dhidden[tokens])
        if scales is not None:
            dlogits *= scales.for_dweight / scales.for_dhidden
        problem.dweight(dlogits, hidden[tokens], dweight, add=tokens.start > 0)


def _in_place_of_dweight(problem: _Problem, dhidden: Tensor, dweight: Tensor) -> None:
    """Every gradient is one product, summed in float32 inside it, and the logits lie in ``dweight`` itself.

    ``dweight`` is written last, and its memory has room for the logits of C tokens. So rounds of C tokens go
    through it: logits, softmax, ``dhidden``. What the last round leaves there is already, row by row, the
    ``dlogits`` that the same rows of ``dweight`` are made from; those of the earlier tokens are made again.
    Summed over chunks of tokens instead, ``dweight`` would need a copy in float32: twice its own memory.
    """
    hidden, V, scales = problem.hidden, problem.weight.shape[0], problem.scales
    N, C = hidden.shape
    kept = min(N, C)
    first = (N - kept) % C
    for tokens in (*_pieces(0, first, C), *_pieces(first, N, C)):
        dlogits = dweight[:, : tokens.stop - tokens.start]
        problem.reduce(tokens, dlogits)
        problem.gradient(tokens, slice(0, V), dlogits, scales and scales.for_dhidden)
        problem.dhidden(dlogits, dhidden[tokens])
    # However few the tokens, 2.9 % of the logits at most: 1,664 of 58,240 ids, whose products of 128 x 256
    # fill all but two of an H200's multiprocessors. 2 % on the CPU, where PyTorch's own take memory, too.
    share = 50 if hidden.device.type == "cpu" else 34
    v = min(_chunk(N, 128), max(V // share // 128 * 128, 128), V)
    chunk = hidden.new_empty(v * N)
    for ids in _pieces(0, V, v):
        dlogits = chunk[: (ids.stop - ids.start) * N].view(-1, N)
        if kept < N:
            earlier = slice(0, N - kept)
            problem.logits(earlier, ids, dlogits[:, earlier])
            problem.gradient(earlier, ids, dlogits[:, earlier], scales and scales.for_dweight)
        dlogits[:, N - kept :] = dweight[ids, :kept]
        if scales is not None:
            dlogits[:, N - kept :] *= scales.for_dweight / scales.for_dhidden
        problem.dweight(dlogits, hidden, dweight[ids])
