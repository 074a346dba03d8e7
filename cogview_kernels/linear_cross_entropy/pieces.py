# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy in pieces: PyTorch's own matrix products, and between them the steps of a backend.

Letters: N tokens, C width, V ids in the softmax. Logits and their gradients are held with a row per id and a
column per token, ``[v, n]``, so that a piece of them fits in the memory of ``dweight``, ``[V, C]``.

FLOPs: 2 N C V for the losses; with gradients 6 N C V, and up to 2 (N - C) C V more where
:func:`_in_place_of_dweight` makes logits twice. Memory beyond the gradients: one piece, or ``extra_memory``
times that of the logits where this is more, and some 30 bytes a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cogview_kernels import _device

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


class Options(NamedTuple):
    """Whether to make ``gradients``, by the ``steps`` of which backend, and in how much memory.

    ``extra_memory`` is in units of that of all logits; a piece is held in any case.
    """

    gradients: bool
    steps: Steps
    extra_memory: float = 0.0


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
    scales: _Scales | None
    room: int
    """How many logits may be held beyond the gradients. CHUNK_ELEMENTS may be in any case."""

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

    def round(self, tokens: slice, dlogits: Tensor, dhidden: Tensor) -> None:
        """Makes the gradients of all logits of ``tokens`` in ``dlogits``, and the rows of ``dhidden``."""
        self.reduce(tokens, dlogits)
        self.gradient(tokens, slice(0, len(dlogits)), dlogits, self.scales and self.scales.for_dhidden)
        torch.mm(dlogits.T, self.weight, out=dhidden[tokens])

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


def _chunk(length: int, multiple: int, room: int) -> int:
    """How many rows of ``length`` elements fit in ``room``: a multiple of what suits a tile, if it can be."""
    return max(room // length // multiple * multiple, 16)


def _chunk_of_tokens(problem: _Problem) -> int:
    """All tokens where their logits fit, for only float32 gradients are to be summed over chunks."""
    N, V, room = len(problem.hidden), len(problem.weight), max(CHUNK_ELEMENTS, problem.room)
    return N if room >= V * N else min(_chunk(V, 32, room), N)


def _filling(most: int, columns: int, device: torch.device) -> int:
    """At most ``most`` rows of a product, such that its tiles of 128 x 256 fill the multiprocessors of a GPU.

    2,560 x 2,560 are 200 tiles. An H100 has 132 multiprocessors, so that 200 tiles take as long as 264. 1,664
    rows are 130 tiles.
    """
    at_once = _device.multiprocessors(device)

    def used(rows: int) -> float:
        tiles = -(-rows // 128) * -(-columns // 256)
        return round(tiles / (-(-tiles // at_once) * at_once), 2)

    return max((*range(128, most, 128), most), key=lambda rows: (used(rows), rows))


class _Sizes(NamedTuple):
    """What :func:`_in_place_of_dweight` takes at a time: ``tokens`` of a round, ``ids`` of a piece.

    A buffer keeps the ``dlogits`` of ``kept`` tokens. Its first rows are used up as the memory of the pieces.
    """

    tokens: int
    ids: int
    kept: int


def _sizes(N: int, C: int, V: int, room: int, device: torch.device) -> _Sizes:
    """For N tokens where the buffer, ``max(ids * N, kept * V)`` elements, may have ``room``, or a chunk.

    However few the tokens, a piece is a share of the logits. On a GPU that is 2.9 %, 1,664 of 58,240 ids: one
    wave of tiles, and at CogView's batch L2 holds the piece between its steps. On the CPU it is 2 %, because
    PyTorch's own products take memory, too.
    """
    on_cpu = device.type == "cpu"
    share = max(V // (50 if on_cpu else 34) // 128 * 128, 128)
    tokens, ids = C, min(max(_chunk(N, 128, CHUNK_ELEMENTS), room // (2 * N) // 128 * 128), share, V)
    if not on_cpu:
        tokens, ids = _filling(C, C, device), _filling(ids, C, device)
    # Rows of 128 bytes in 16 bits. The pieces would use up most rows of a smaller buffer.
    kept = min(room // V // 64 * 64, max(N - C, 0))
    return _Sizes(tokens, ids, kept if kept * V >= 2 * ids * N else 0)


def linear_cross_entropy_in_pieces(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    vocab_range: tuple[int, int],
    options: Options,
) -> Result:
    """The losses of the softmax over the ids of ``vocab_range``, and with ``options.gradients`` those.

    The coefficients of float16 gradients must be at most 1.
    """
    (N, C), (start, stop) = hidden.shape, vocab_range
    V, gradients = stop - start, options.gradients
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
    room = int(min(options.extra_memory, 1.0) * n * V)
    problem = _Problem(hidden, weight, target, coefficient, options.steps, stats, scales, room)
    part = dhidden if counted is None or not gradients else hidden.new_empty(hidden.shape)
    if n == 0:
        in_range.zero_()
    elif not gradients:
        _losses_only(problem)
    elif V * n <= max(CHUNK_ELEMENTS, room) or (hidden.dtype == torch.float32 and n > C):
        _accumulated(problem, part, in_range)
    else:
        _in_place_of_dweight(problem, part, in_range, _sizes(n, C, V, room, hidden.device))
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
    n = min(_chunk_of_tokens(problem), max(len(hidden) // 4, 128), len(hidden))
    chunk = hidden.new_empty(V * n)
    for tokens in _pieces(0, len(hidden), n):
        problem.reduce(tokens, chunk[: V * (tokens.stop - tokens.start)].view(V, -1))


def _accumulated(problem: _Problem, dhidden: Tensor, dweight: Tensor) -> None:
    """Chunk by chunk of tokens, ``dweight`` summed over them: exact in float32 or for a single chunk."""
    hidden, V, scales = problem.hidden, problem.weight.shape[0], problem.scales
    n = _chunk_of_tokens(problem)
    chunk = hidden.new_empty(V * n)
    for tokens in _pieces(0, len(hidden), n):
        dlogits = chunk[: V * (tokens.stop - tokens.start)].view(V, -1)
        problem.round(tokens, dlogits, dhidden)
        if scales is not None:
            dlogits *= scales.for_dweight / scales.for_dhidden
        problem.dweight(dlogits, hidden[tokens], dweight, add=tokens.start > 0)


def _in_place_of_dweight(problem: _Problem, dhidden: Tensor, dweight: Tensor, sizes: _Sizes) -> None:
    """Every gradient is one product, summed in float32 inside it, and the logits lie in ``dweight`` itself.

    ``dweight`` is written last, and its memory has room for the logits of C tokens. So rounds of tokens go
    through it: logits, softmax, ``dhidden``. What the last C tokens leave there is already, row by row, the
    ``dlogits`` that the same rows of ``dweight`` are made from. Those of ``sizes.kept`` tokens before lie
    in a buffer. Those of the earlier tokens are made again, piece by piece of the ids. Summed over chunks of
    tokens instead, ``dweight`` would need a copy in float32: twice its own memory.
    """
    hidden, V, scales = problem.hidden, problem.weight.shape[0], problem.scales
    N, C = hidden.shape
    v, kept, last = sizes.ids, sizes.kept, max(N - C, 0)
    earlier = last - kept
    buffer = hidden.new_empty(max(kept * V, v * N))
    beside = buffer[: kept * V].view(V, kept)
    for tokens in _pieces(0, earlier, sizes.tokens):
        problem.round(tokens, dweight[:, : tokens.stop - tokens.start], dhidden)
    for place, start, stop in ((beside, earlier, last), (dweight, last, N)):
        for tokens in _pieces(start, stop, sizes.tokens):
            problem.round(tokens, place[:, tokens.start - start : tokens.stop - start], dhidden)
    # A piece lies over the first rows of the buffer, whose ids are made again in full.
    used_up = -(-v * N // kept) if kept else 0
    for ids in _pieces(0, V, v):
        dlogits = buffer[: (ids.stop - ids.start) * N].view(-1, N)
        again = slice(0, last if ids.start < used_up else earlier)
        if again.stop:
            problem.logits(again, ids, dlogits[:, again])
            problem.gradient(again, ids, dlogits[:, again], scales and scales.for_dweight)
        if again.stop < last:
            dlogits[:, earlier:last] = beside[ids]
        dlogits[:, last:] = dweight[ids, : N - last]
        if scales is not None:
            dlogits[:, again.stop :] *= scales.for_dweight / scales.for_dhidden
        problem.dweight(dlogits, hidden, dweight[ids])
