# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy in pieces, by the steps of a backend, of which matrix products take nearly all time.

Letters: N tokens, C width, V ids in the softmax. Logits and their gradients are held with a row per id and a
column per token, ``[v, n]``, so that a piece of them fits in the memory of ``dweight``, ``[V, C]``.

FLOPs: 2 N C V for the losses, and as many for each of ``dhidden`` and ``dweight`` that is asked for. Up to
2 (N - C) C V more where :func:`_in_place_of_dweight` makes logits twice. :func:`_summed_in_24_bits` makes
none twice; for each chunk it reads and writes ``dweight`` and a byte beside each element.

Memory beyond the gradients: one piece, or ``extra_memory`` times that of the logits where this is more, some
30 bytes a token and, on a CPU, what its own products hold: at most 16 MB of sums, and on AMD's processors a
packed copy of ``hidden``; where the processor multiplies no 16-bit numbers, up to 32 MiB in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cogview_kernels import _device
from cogview_kernels.linear_cross_entropy.objective import PLAIN, Objective

# 2.9 % of the logits of 8,704 tokens over 58,240 ids.
CHUNK_ELEMENTS = 14 * 2**20
# Of a chunk of _summed_in_24_bits. With 96 its passes over the weights took what making logits twice does.
FEWEST_TOKENS = 128
# What a product in float32 of 16-bit operands makes at a time: 8 MiB of each operand, 16 MiB of sums.
WIDENED_SIDE, WIDENED_DEPTH = 2048, 1024


class Piece(NamedTuple):
    """Logits ``[v, n]``, rows of any stride, of the ids from ``first`` on, of ``ids`` in the whole softmax.

    They are products alone: the steps add ``bias`` ``[v]``, float32, where there is one.
    """

    logits: Tensor
    first: int
    ids: int
    bias: Tensor | None = None


class Tokens(NamedTuple):
    """``[n]`` each. ``stats`` ``[3, n]``: a token's largest logit, its sum of ``exp(logit - largest)``, and
    the logit of its target, -inf where that is no id. Label smoothing has a fourth row, the sum of
    ``logit - largest``. ``predicted``, if wanted, int64: the id of the largest logit."""

    target: Tensor
    coefficient: Tensor
    stats: Tensor
    predicted: Tensor | None = None

    def part(self, tokens: slice) -> Tokens:
        predicted = None if self.predicted is None else self.predicted[tokens]
        return Tokens(self.target[tokens], self.coefficient[tokens], self.stats[:, tokens], predicted)


class AddToSum(Protocol):
    """Adds a product to a sum in float32 of which 24 bits are kept."""

    def __call__(self, a: Tensor, b: Tensor, high: Tensor, low: Tensor, *, first: bool, last: bool) -> None:
        """``high``, bfloat16, is the sum's upper half, and ``low``, uint8, the byte below it. The ``first``
        product finds no sum there, and the ``last`` one rounds it to ``high``."""


class Steps(Protocol):
    """What a backend, a module, does to logits and to gradients."""

    def limit(self, backend: str, hidden: Tensor) -> str:
        """Why it cannot take ``hidden``; empty when it can."""

    def reduce(self, piece: Piece, tokens: Tokens, objective: Objective) -> None:
        """Brings ``stats`` and ``predicted`` from the ids before the piece, or from none where it is the
        first, to those that end with it."""

    def gradient(self, piece: Piece, tokens: Tokens, objective: Objective, dbias: Tensor | None) -> None:
        """Turns logits into the gradients of ``(coefficient * losses).sum()`` by them: exact zeros where
        ``coefficient`` is zero. Their sums over the tokens are added to ``dbias`` ``[v]``, float32."""

    def product(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, alpha: float = 1.0) -> None:
        """``out = alpha * (a @ b)``, or ``out += alpha * (a @ b)``, multiplied by ``alpha`` before it is
        rounded."""

    def adder(self, out: Tensor) -> AddToSum | None:
        """The function that adds products up in ``out`` and a byte beside each of its elements, if any."""

    def scale(self, gradient: Tensor, factor: Tensor) -> None:
        """``gradient *= factor``, a scalar, multiplied in float32 and rounded once, with no float32 copy."""


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, alpha: float = 1.0) -> None:
    """See :class:`Steps`; PyTorch's own, in float32 where it has none in ``a.dtype``."""
    if a.device.type == "cpu" and _device.emulates(a.dtype):
        _widened_product(a, b, out, add=add, alpha=alpha)
    elif add or alpha != 1:
        torch.addmm(out, a, b, beta=1 if add else 0, alpha=alpha, out=out)
    else:
        torch.mm(a, b, out=out)


def _widened_product(a: Tensor, b: Tensor, out: Tensor, *, add: bool, alpha: float) -> None:
    """The product in float32, block by block, rounded once."""
    (M, K), N = a.shape, b.shape[1]
    for rows in ranges(0, M, WIDENED_SIDE):
        for columns in ranges(0, N, WIDENED_SIDE):
            block = out[rows, columns]
            sums = block.float() if add else torch.zeros_like(block, dtype=torch.float32)
            for depth in ranges(0, K, WIDENED_DEPTH):
                sums.addmm_(a[rows, depth].float(), b[depth, columns].float(), alpha=alpha)
            block.copy_(sums)


def no_adder(out: Tensor) -> None:
    """See :class:`Steps`."""


class Wanted(NamedTuple):
    """Which gradients are to be made, and whether the predicted tokens are."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    predicted: bool = False

    @property
    def gradients(self) -> bool:
        return self.hidden or self.weight or self.bias


class Options(NamedTuple):
    """What is ``wanted`` of which ``objective``, by the ``steps`` of which backend, in how much memory.

    ``extra_memory`` is in units of that of all logits; a piece is held in any case.
    """

    wanted: Wanted
    steps: Steps
    objective: Objective = PLAIN
    extra_memory: float = 0.0


class Result(NamedTuple):
    """``losses`` ``[N]``, float32: of each token, 0 where its coefficient is zero; ``predicted`` is -1 there.

    The gradients are those of ``(coefficient * losses).sum()``, ``dhidden`` and ``dweight`` multiplied by the
    two ``scales`` (ones but for float16), ``dbias`` in float32. What is not wanted is empty.
    """

    losses: Tensor
    predicted: Tensor
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor
    scales: Tensor


@dataclass
class _Problem:
    """``dhidden``, ``dweight`` and ``dbias`` are None where they are not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    tokens: Tokens
    objective: Objective
    steps: Steps
    scales: _Scales | None
    dhidden: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    room: int
    """How many logits may be held beyond the gradients. CHUNK_ELEMENTS may be in any case."""

    def piece(self, ids: slice, logits: Tensor) -> Piece:
        return Piece(logits, ids.start, len(self.weight), None if self.bias is None else self.bias[ids])

    def logits(self, tokens: slice, ids: slice, out: Tensor) -> None:
        self.steps.product(self.weight[ids], self.hidden[tokens].T, out)

    def reduce(self, tokens: slice, ids: slice, logits: Tensor) -> None:
        """Makes the logits of ``tokens`` for ``ids`` in ``logits``, and brings their ``stats`` up to them."""
        self.logits(tokens, ids, logits)
        self.steps.reduce(self.piece(ids, logits), self.tokens.part(tokens), self.objective)

    def gradient(
        self, tokens: slice, ids: slice, logits: Tensor, factor: Tensor | None, dbias: Tensor | None = None
    ) -> None:
        """The gradients of the logits in their place; ``factor``, if any, multiplies the coefficients."""
        part = self.tokens.part(tokens)
        if factor is not None:
            part = part._replace(coefficient=part.coefficient * factor)
        self.steps.gradient(self.piece(ids, logits), part, self.objective, dbias)

    def round(self, tokens: slice, dlogits: Tensor) -> None:
        """Makes the gradients of all logits of ``tokens`` in ``dlogits``, and adds to ``dhidden`` and
        ``dbias``."""
        ids = slice(0, len(dlogits))
        self.reduce(tokens, ids, dlogits)
        self.gradient(tokens, ids, dlogits, self.scales and self.scales.for_dhidden, self.dbias)
        if self.dhidden is not None:
            self.steps.product(dlogits.T, self.weight, self.dhidden[tokens])

    def add_dweight(self, dlogits: Tensor, hidden: Tensor, out: Tensor, *, add: bool = False) -> None:
        alpha = 1.0 if self.scales is None else self.scales.alpha
        self.steps.product(dlogits, hidden, out, add=add, alpha=alpha)


class _Scales(NamedTuple):
    """Factors that keep float16 gradients in its range: below 2^15 whatever the data, and large.

    The gradients of the logits are multiplied by ``for_dhidden`` on their way to ``dhidden``, by
    ``for_dweight`` on their way to ``dweight``, and ``dweight`` by ``alpha`` besides. The first two factors
    are powers of two that lie on the device, so that nobody waits to know them.
    """

    for_dhidden: Tensor
    for_dweight: Tensor
    alpha: float


def _largest(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


def _excess(hidden: Tensor, weight: Tensor, bias: Tensor | None, objective: Objective) -> Tensor | int:
    """The exponent of a power of two above ``1 + z_loss * |lse|``, by which z-loss makes gradients larger."""
    if not objective.z_loss:
        return 0
    logit = (hidden.shape[1] * _largest(hidden) * _largest(weight)).clamp(max=65504)
    if bias is not None:
        logit = logit + _largest(bias)
    if objective.softcap:
        logit = logit.clamp(max=objective.softcap)
    return torch.frexp(1 + objective.z_loss * (logit + math.log(len(weight)))).exponent


def _scales(hidden: Tensor, weight: Tensor, bias: Tensor | None, objective: Objective) -> _Scales | None:
    """For coefficients of at most 1."""
    if hidden.dtype != torch.float16 or hidden.numel() == 0:
        return None
    excess = _excess(hidden, weight, bias, objective)

    def power_of_two(limit: int, most: int, x: Tensor) -> Tensor:
        """The largest, at most ``2^most``, that keeps ``x`` below ``2^limit``, and less by the excess."""
        exponent = torch.frexp(_largest(x)).exponent
        exponent = (limit - exponent).clamp(max=most) - excess
        return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)

    # dhidden is at most 2 max|weight|; dweight at most N max|hidden|.
    return _Scales(power_of_two(14, 8, weight), power_of_two(18, 14, hidden), 0.125 / hidden.shape[0])


def ranges(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def _chunk(length: int, multiple: int, room: int) -> int:
    """How many rows of ``length`` elements fit in ``room``: a multiple of what suits a tile, if it can be."""
    return max(room // length // multiple * multiple, 16)


def _chunk_of_tokens(problem: _Problem) -> int:
    """All tokens where their logits fit, for only float32 gradients are to be summed over chunks.

    Chunks are of equal size, and on the CPU twice as large: each reads and writes ``dweight`` once more,
    which no product there is fast enough to hide.
    """
    N, V, hidden = len(problem.hidden), len(problem.weight), problem.hidden
    room = max(CHUNK_ELEMENTS * (2 if hidden.device.type == "cpu" else 1), problem.room)
    if room >= V * N:
        return N
    most = min(_chunk(V, 32, room), N)
    chunks = -(-N // most)
    return min(-(-N // chunks // 32) * 32, most)


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
    bias: Tensor | None,
    target: Tensor,
    coefficient: Tensor,
    vocab_range: tuple[int, int],
    options: Options,
) -> Result:
    """The losses of the softmax over the ids of ``vocab_range``, and what else ``options`` wants.

    The coefficients of float16 gradients must be at most 1.
    """
    (start, stop), wanted = vocab_range, options.wanted
    result = _empty_result(hidden, weight, coefficient, wanted)
    if bias is not None:
        bias = bias.float().contiguous()  # kernels know of no stride
    dweight, dbias = result.dweight, result.dbias
    if len(weight) > stop - start:
        ids = slice(start, stop)
        for x in (dweight, dbias):
            x[:start] = 0
            x[stop:] = 0
        dweight, dbias, bias = dweight[ids], dbias[ids], None if bias is None else bias[ids]
        weight, target = weight[ids], target - start
    counted = None
    if hidden.device.type == "cpu":  # elsewhere their number would cost a synchronisation
        counted = coefficient != 0
        if bool(counted.all()):
            counted = None
        else:
            hidden, target, coefficient = hidden[counted], target[counted], coefficient[counted]
    n = hidden.shape[0]
    stats = coefficient.new_empty(4 if options.objective.label_smoothing else 3, n)
    tokens = Tokens(target, coefficient, stats, target.new_empty(n) if wanted.predicted else None)
    dhidden = result.dhidden if counted is None or not wanted.hidden else hidden.new_empty(hidden.shape)
    problem = _Problem(
        hidden,
        weight,
        bias,
        tokens,
        options.objective,
        options.steps,
        _scales(hidden, weight, bias, options.objective) if wanted.gradients else None,
        dhidden if wanted.hidden else None,
        dweight if wanted.weight else None,
        dbias.zero_() if wanted.bias else None,
        room=int(min(options.extra_memory, 1.0) * n * len(weight)),
    )
    _solve(problem)
    return _finished(problem, result, counted, start)


def _empty_result(hidden: Tensor, weight: Tensor, coefficient: Tensor, wanted: Wanted) -> Result:
    N, V = len(hidden), len(weight)
    return Result(
        coefficient.new_empty(N),
        hidden.new_empty(N if wanted.predicted else 0, dtype=torch.int64),
        hidden.new_empty(hidden.shape if wanted.hidden else 0),
        hidden.new_empty(weight.shape if wanted.weight else 0),
        coefficient.new_empty(V if wanted.bias else 0),
        coefficient.new_ones(2),
    )


def _solve(problem: _Problem) -> None:
    """Fills what the problem has room for: the stats of tokens, and the gradients."""
    (n, C), V, dweight = problem.hidden.shape, len(problem.weight), problem.dweight
    fits = V * n <= max(CHUNK_ELEMENTS, problem.room)
    if n == 0:
        if dweight is not None:
            dweight.zero_()
    elif problem.dhidden is None and dweight is None and problem.dbias is None:
        _losses_only(problem)
    elif dweight is None or fits or (dweight.dtype == torch.float32 and n > C):
        _accumulated(problem)
    elif chunk := _chunk_beside_bytes(problem, dweight):
        _summed_in_24_bits(problem, dweight, chunk)
    else:
        _in_place_of_dweight(problem, dweight, _sizes(n, C, V, problem.room, dweight.device))


def _finished(problem: _Problem, result: Result, counted: Tensor | None, start: int) -> Result:
    """``result`` of all tokens, from the problem of those that are ``counted``; ids begin with ``start``."""
    tokens, scales = problem.tokens, problem.scales
    losses = torch.where(
        tokens.coefficient != 0, problem.objective.losses(tokens.stats, len(problem.weight)), 0
    )
    predicted = result.predicted
    if tokens.predicted is not None:
        predicted = (tokens.predicted + start).masked_fill(tokens.coefficient == 0, -1)
    if counted is not None:
        losses = torch.zeros_like(result.losses).masked_scatter_(counted, losses)
        if tokens.predicted is not None:
            predicted = torch.full_like(result.predicted, -1).masked_scatter_(counted, predicted)
        if problem.dhidden is not None:
            result.dhidden.zero_()[counted] = problem.dhidden
    result = result._replace(losses=losses, predicted=predicted)
    if scales is None:
        return result
    if problem.dbias is not None:
        problem.dbias.div_(scales.for_dhidden)
    return result._replace(scales=torch.stack((scales.for_dhidden, scales.for_dweight * scales.alpha)))


def _losses_only(problem: _Problem) -> None:
    """Piece by piece of the ids, all tokens at once or 8,192: a wide product, and the weight is read once.

    On the CPU half a piece is enough to be wide, and more of it stays in the caches until it is reduced.
    """
    N, V, device = len(problem.hidden), len(problem.weight), problem.hidden.device
    n = min(N, 8192)
    v = min(_chunk(n, 128, CHUNK_ELEMENTS // (2 if device.type == "cpu" else 1)), V)
    if device.type != "cpu":
        v = _filling(v, n, device)
    chunk = problem.hidden.new_empty(v * n)
    for tokens in ranges(0, N, n):
        width = tokens.stop - tokens.start
        for ids in ranges(0, V, v):
            problem.reduce(tokens, ids, chunk[: width * (ids.stop - ids.start)].view(-1, width))


def _accumulated(problem: _Problem) -> None:
    """Chunk by chunk of tokens, ``dweight`` summed over them: exact in float32 or for a single chunk."""
    hidden, V, scales = problem.hidden, len(problem.weight), problem.scales
    n = _chunk_of_tokens(problem)
    chunk = hidden.new_empty(V * n)
    for tokens in ranges(0, len(hidden), n):
        dlogits = chunk[: V * (tokens.stop - tokens.start)].view(V, -1)
        problem.round(tokens, dlogits)
        if problem.dweight is None:
            continue
        if scales is not None:
            dlogits *= scales.for_dweight / scales.for_dhidden
        problem.add_dweight(dlogits, hidden[tokens], problem.dweight, add=tokens.start > 0)


def _chunk_beside_bytes(problem: _Problem, dweight: Tensor) -> int:
    """Tokens of a chunk that fits in the room with a byte for each element of ``dweight``; 0 if none does.

    The room is for the parts of the chunk's ``dhidden``, too, that the extension's product sums: eight floats
    an element (``kParts`` in csrc/linear_cross_entropy).
    Each chunk passes over ``weight`` twice and over ``dweight``, so that few tokens are not worth it.
    """
    if len(problem.hidden) <= dweight.shape[1] or problem.steps.adder(dweight) is None:
        return 0
    V, C = dweight.shape
    tokens = (problem.room - V * C // 2) // (V + 8 * 2 * C) // 32 * 32
    return tokens if tokens >= FEWEST_TOKENS else 0


def _summed_in_24_bits(problem: _Problem, dweight: Tensor, chunk: int) -> None:
    """Chunk by chunk of tokens, ``dweight`` summed over them in 24 bits, of which 16 lie in it.

    The logits of the first C tokens lie in ``dweight`` itself, which they are the gradients of afterwards.
    """
    hidden, add = problem.hidden, problem.steps.adder(dweight)
    N, (V, C) = len(hidden), dweight.shape
    assert add is not None
    for tokens in ranges(0, C, chunk):
        problem.round(tokens, dweight[:, tokens])
    low = torch.empty_like(dweight, dtype=torch.uint8)
    buffer = hidden.new_empty(V * chunk)
    for ids in ranges(0, V, max(1, len(buffer) // C)):
        dlogits = buffer[: (ids.stop - ids.start) * C].view(-1, C).copy_(dweight[ids])
        add(dlogits, hidden[:C], dweight[ids], low[ids], first=True, last=False)
    for tokens in ranges(C, N, chunk):
        dlogits = buffer[: V * (tokens.stop - tokens.start)].view(V, -1)
        problem.round(tokens, dlogits)
        add(dlogits, hidden[tokens], dweight, low, first=False, last=tokens.stop == N)


def _in_place_of_dweight(problem: _Problem, dweight: Tensor, sizes: _Sizes) -> None:
    """Every gradient is one product, summed in float32 inside it, and the logits lie in ``dweight`` itself.

    ``dweight`` is written last, and its memory has room for the logits of C tokens. So rounds of tokens go
    through it: logits, softmax, ``dhidden``. What the last C tokens leave there is already, row by row, the
    ``dlogits`` that the same rows of ``dweight`` are made from. Those of ``sizes.kept`` tokens before lie
    in a buffer. Those of the earlier tokens are made again, piece by piece of the ids. Summed over chunks of
    tokens instead, ``dweight`` would need a copy in float32: twice its own memory.
    """
    hidden, V, scales = problem.hidden, len(problem.weight), problem.scales
    N, C = hidden.shape
    v, kept, last = sizes.ids, sizes.kept, max(N - C, 0)
    earlier = last - kept
    buffer = hidden.new_empty(max(kept * V, v * N))
    beside = buffer[: kept * V].view(V, kept)
    for tokens in ranges(0, earlier, sizes.tokens):
        place = dweight[:, : tokens.stop - tokens.start]
        if problem.dhidden is None and problem.dbias is None:
            problem.reduce(tokens, slice(0, V), place)
        else:
            problem.round(tokens, place)
    for place, start, stop in ((beside, earlier, last), (dweight, last, N)):
        for tokens in ranges(start, stop, sizes.tokens):
            problem.round(tokens, place[:, tokens.start - start : tokens.stop - start])
    # A piece lies over the first rows of the buffer, whose ids are made again in full.
    used_up = -(-v * N // kept) if kept else 0
    for ids in ranges(0, V, v):
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
        problem.add_dweight(dlogits, hidden, dweight[ids])
