# SPDX-License-Identifier: Apache-2.0
"""The one loop that draws tokens: read all prompts at once, then add tokens to every row at a time.

Pictures, captions and infilling go through :func:`decode`, ranking through :func:`score`. With guidance each
row stands in the batch twice, first with its text (all rows), then without. On a GPU a step is captured as a
CUDA graph, so it only touches tensors in place and nothing in it waits for the device.

Letters: B rows that are drawn, R rows of the batch (B, or 2 B with guidance), N tokens to draw, C width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cogview.config import SamplingConfig
from cogview.generation.graph import on_device
from cogview.generation.sampling import Noise, choose, drawing_of
from cogview.model.cache import KVCache
from cogview.model.decoder import Decoder
from cogview.model.transformer import CogView
from cogview_kernels import decode_linear, linear_cross_entropy

GREEDY = SamplingConfig(temperature=0)
STOP_EVERY = 8  # steps between two looks at whether every row has stopped: a look waits for the device
SCORED_TOKENS = 1 << 16  # that go through the model at a time


@dataclass(frozen=True)
class DrawOptions:
    """How tokens are drawn, whatever they are."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    max_batch: int = 256  # rows that are drawn together
    parallel: int = 1  # codes that a step tries: 1 draws one by one, more guess and verify, to the same codes
    on_step: Callable[[int], object] | None = None  # called with the number of tokens just drawn

    def __post_init__(self) -> None:
        for name in ("max_batch", "parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Task:
    """What is drawn behind B rows."""

    allowed: Sequence[range]  # the ids that may be drawn; the logits of no others are computed
    num_tokens: int
    seeds: Sequence[int]  # one for each row, so that its outcome does not depend on the other rows
    given: Tensor | None = None  # int64 [B, num_tokens], on any device: ids that stand already, -1 elsewhere
    first: int = 0  # which token of its kind the first one is: the noise of a token goes by its place
    stop: int | None = None  # the id after which nothing that a row draws counts
    on_tokens: Callable[[Tensor], object] | None = None  # called after a step with the ids, -1: not drawn yet


class Rows(NamedTuple):
    """Rows that the model has read so far."""

    cache: KVCache  # keys and values of their tokens
    hidden: Tensor  # [R, C], the final hidden state of each row's last token
    step: Decoder  # reads more of them


@torch.no_grad()
def prefill(
    model: CogView,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    spare: int = 0,
    restart: int | None = None,
) -> Rows:
    """Read prompts of any lengths in one batch, with room for ``new_tokens`` more per row.

    Prompts that are alike are read once. ``spare``: further room, for guesses that may turn out wrong.
    ``restart``: the token of each prompt at which positions begin at 0 again.
    ValueError if the longest prompt and the new tokens exceed the model's positions.
    """
    config, device = model.config, model.word_embeddings.weight.device
    longest = max(len(prompt) for prompt in prompts)
    restarts = [0 if restart is None else prompt.index(restart) for prompt in prompts]
    counted = max(len(prompt) - first for prompt, first in zip(prompts, restarts, strict=True))
    if max(counted + new_tokens, *restarts) > config.max_positions:
        excess = max(counted + new_tokens, *restarts) - config.max_positions
        raise ValueError(
            f"the prompt has {longest} tokens and {new_tokens} are to follow, but the model has "
            f"{config.max_positions} positions; shorten the text by {excess}"
        )
    place: dict[tuple[int, ...], int] = {}
    index = [place.setdefault(tuple(prompt), len(place)) for prompt in prompts]
    tokens = torch.tensor([(*prompt, *[0] * (longest - len(prompt))) for prompt in place], device=device)
    each_once = len(place) == len(prompts)
    capacity = longest + new_tokens + spare
    cache = KVCache(
        num_layers=config.num_layers,
        batch=len(place),
        num_heads=config.num_heads,
        capacity=capacity if each_once else longest,
        head_size=config.hidden_size // config.num_heads,
        device=device,
        dtype=model.word_embeddings.weight.dtype,
    )
    if restart is not None:
        restarts = [prompt.index(restart) for prompt in place]
        cache.restart = torch.tensor(restarts, device=device)[:, None]
    # Padding stands behind the prompts, where causal attention never looks back at it.
    step = Decoder(model)
    hidden = step(tokens, cache)
    last = hidden[:, -1].clone()  # a view would keep all that the prompts left
    if any(len(prompt) < longest for prompt in place):
        lengths = torch.tensor([len(prompt) for prompt in place], device=device)
        cache.set_lengths(lengths)
        last = hidden[torch.arange(len(place), device=device), lengths - 1]
    if not each_once:
        cache, last = cache.take(index, capacity), last[torch.tensor(index, device=device)]
    return Rows(cache, last, step)


@torch.no_grad()
def decode(model: CogView, rows: Rows, task: Task, options: DrawOptions) -> Tensor:
    """Draw ``task.num_tokens`` more tokens for every row; ids, int64 ``[B, num_tokens]``.

    FloatingPointError if the model's numbers are not finite.
    """
    loop = (_OneByOne if options.parallel == 1 else _GuessAndVerify)(model, rows, task, options)
    loop.start()
    loop.check_finite()  # damaged weights are told now, not after a thousand steps
    advance = on_device(loop.next_step(), rows.hidden.device)
    turn = 0
    while not loop.is_done(turn):
        advance()
        turn += 1
        loop.report()
    loop.check_finite()
    return loop.result()


@torch.no_grad()
def score(
    model: CogView, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], ids: range
) -> Tensor:
    """Mean negative log-likelihood of each text's tokens behind its prompt; float32 ``[N]``, nats a token.

    Args:
        texts: token ids, at least one each, all among ``ids``.
        ids: what takes part in the softmax.

    FloatingPointError if a loss is not finite.
    """
    device = model.word_embeddings.weight.device
    losses = [torch.empty(0, dtype=torch.float32, device=device)]
    longest = max((len(p) + len(t) - 1 for p, t in zip(prompts, texts, strict=True)), default=1)
    rows = max(1, SCORED_TOKENS // longest)
    for start in range(0, len(prompts), rows):
        pairs = list(zip(prompts[start : start + rows], texts[start : start + rows], strict=True))
        width = max(len(text) for _, text in pairs)
        with torch.device("cpu"):
            tokens = torch.zeros(len(pairs), max(len(p) + len(t) - 1 for p, t in pairs), dtype=torch.int64)
            target = torch.full((len(pairs), width), -100)
            for row, (prompt, text) in enumerate(pairs):
                tokens[row, : len(prompt) + len(text) - 1] = torch.tensor([*prompt, *text[:-1]])
                target[row, : len(text)] = torch.tensor(text) - ids.start
            before = torch.tensor([len(prompt) - 1 for prompt, _ in pairs])[:, None] + torch.arange(width)
        before = before.clamp(max=tokens.shape[1] - 1).to(device)
        hidden = model(tokens.to(device))
        hidden = hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1]))
        # A step behind the end of a text has the ignored target, hence loss 0.
        token_loss = linear_cross_entropy(
            hidden.flatten(0, 1),
            model.word_embeddings.weight[ids.start : ids.stop],
            target.to(device).flatten(),
            reduction="none",
        )
        counted = (target >= 0).sum(1).to(device)
        losses.append(token_loss.view(target.shape).float().sum(1) / counted)
    found = torch.cat(losses)
    if not bool(found.isfinite().all()):
        raise FloatingPointError(
            "a CapLoss is not finite (NaN or infinite): the model's weights are damaged, or overflow in "
            f"this precision, {model.word_embeddings.weight.dtype}"
        )
    return found


class _OneByOne:
    """A batch that draws a token a step. Every tensor here is changed in place only."""

    def __init__(self, model: CogView, rows: Rows, task: Task, options: DrawOptions) -> None:
        device = rows.hidden.device
        B = len(task.seeds)
        self.model, self.task, self.options = model, task, options
        self.cache, self.hidden, self.step = rows
        self.branches = len(rows.hidden) // B
        self.ids: Tensor | None = None  # of image codes, which come first, the index is the id
        if len(task.allowed) > 1 or task.allowed[0].start > 0:
            self.ids = torch.cat(
                [torch.arange(part.start, part.stop, device=device) for part in task.allowed]
            )
        self.heads = [model.word_embeddings.weight[part.start : part.stop] for part in task.allowed]
        seeds = torch.tensor(task.seeds, device=device, dtype=torch.int64)
        self.noise = Noise(seeds, task.num_tokens, sum(map(len, task.allowed)), task.first)
        width = task.num_tokens + options.parallel - 1
        self.given = torch.full((B, width), -1, device=device, dtype=torch.int64)
        if task.given is not None:
            self.given[:, : task.num_tokens] = task.given
        self.tokens = self.given.clone()
        self.done = torch.zeros(B, 1, device=device, dtype=torch.int64)  # tokens that each row has drawn
        # Of all logits: not finite once one was not.
        self.total = torch.zeros((), device=device, dtype=torch.float32)

    def start(self) -> None:
        """The first token, from what the prompts left."""
        hidden = self.hidden[:, None]
        self.last = self.next_tokens([decode_linear(hidden, head) for head in self.heads], self.done)
        self.tokens.scatter_(1, self.done, self.last)
        self.done += 1
        self.report()

    def next_step(self) -> Callable[[], None]:
        """What draws more tokens when called, after the start."""
        drawing = drawing_of(self.options.sampling, self.noise, self.total)
        is_plain = self.branches == 1 and self.ids is None and self.task.given is None
        if not is_plain or drawing is None:
            return self.advance
        rows = self.last, self.tokens, self.done
        return self.step.whole_step(rows, self.cache, self.heads[0], drawing) or self.advance

    def advance(self) -> None:
        """One more token in every row."""
        logits = self.read(self.in_every_branch(self.last))
        self.last.copy_(self.next_tokens(logits, self.done))
        self.tokens.scatter_(1, self.done, self.last)
        self.done += 1

    def in_every_branch(self, x: Tensor) -> Tensor:
        """``[B, ...]`` for the R rows of the batch."""
        return x if self.branches == 1 else torch.cat([x, x])

    def read(self, tokens: Tensor, positions: Tensor | None = None) -> list[Tensor]:
        """Logits ``[R, T, ids]`` behind tokens ``[R, T]``, for each part of the allowed ids."""
        if len(self.heads) == 1:
            return [self.step(tokens, self.cache, positions, self.heads[0])]
        hidden = self.step(tokens, self.cache, positions)
        return [decode_linear(hidden, head) for head in self.heads]

    def next_tokens(self, parts: list[Tensor], positions: Tensor) -> Tensor:
        """The tokens at ``positions`` ``[B, T]`` from the logits for them, as :meth:`read` gives them."""
        logits = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        if self.branches == 2:
            with_text, without = logits.float().chunk(2)
            logits = without + self.options.sampling.guidance * (with_text - without)
        drawn = choose(logits, self.options.sampling, self.noise, positions, self.total)
        if self.ids is not None:
            drawn = self.ids[drawn]
        if self.task.given is None:
            return drawn
        given = self.given.gather(1, positions)
        return torch.where(given >= 0, given, drawn)

    def is_done(self, turn: int) -> bool:
        """Whether nothing is left to draw after ``turn`` steps."""
        if turn >= self.task.num_tokens - 1:
            return True
        if self.task.stop is None or turn % STOP_EVERY < STOP_EVERY - 1:
            return False
        return bool(self.tokens.eq(self.task.stop).any(1).all())

    def check_finite(self) -> None:
        """Waits for the device, unlike a step, which only remembers what it met."""
        if not math.isfinite(self.total.item()):
            raise FloatingPointError(
                "the model's logits are not finite (NaN or infinite): its weights are damaged, or overflow "
                f"in this precision, {self.hidden.dtype}"
            )

    def report(self) -> None:
        if self.options.on_step is not None:
            self.options.on_step(len(self.tokens))
        if self.task.on_tokens is not None:
            self.task.on_tokens(self.tokens[:, : self.task.num_tokens])

    def result(self) -> Tensor:
        tokens = self.tokens[:, : self.task.num_tokens]
        return tokens if self.task.stop is None else tokens.masked_fill(tokens < 0, self.task.stop)


class _GuessAndVerify(_OneByOne):
    """A batch that tries several tokens a step and keeps those that drawing one by one would have drawn.

    The noise of a token is fixed by its row's seed and its position. So a guess that equals what the model
    draws there, given guesses before it that were right too, is right. Each step draws the next ``parallel``
    tokens at once from the last step's guesses and keeps those up to and including the first that differs
    from its guess; what it drew behind that is the next step's guess. This is Jacobi's iteration on sampling
    with fixed noise: Wiggers and Hoogeboom, Predictive Sampling with Forecasting Autoregressive Models,
    arXiv:2002.09928; Teng et al., Speculative Jacobi Decoding, arXiv:2410.01699, draws noise anew instead.
    """

    def __init__(self, model: CogView, rows: Rows, task: Task, options: DrawOptions) -> None:
        super().__init__(model, rows, task, options)
        self.window = torch.arange(options.parallel, device=self.tokens.device)
        self.places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        self.counted = 0

    def next_step(self) -> Callable[[], None]:
        return self.advance

    def start(self) -> None:
        super().start()
        # A picture's neighbours are alike: the first guess of every token is the first token.
        self.tokens.copy_(torch.where(self.given >= 0, self.given, self.tokens[:, :1]))

    def advance(self) -> None:
        """From one to ``parallel`` more tokens in every row; none in a row that is finished."""
        N, T = self.task.num_tokens, self.options.parallel
        inputs = self.in_every_branch(self.tokens.gather(1, self.done - 1 + self.window))
        positions = self.cache.positions(self.cache.lengths[:, None] + self.window)
        positions = positions.clamp(max=self.model.config.max_positions - 1)
        logits = self.read(inputs, positions)
        at = self.done + self.window
        at_most = at.clamp(max=N - 1)  # what stands past the end is never kept
        drawn = self.next_tokens(logits, at_most)
        guesses = self.tokens.gather(1, at_most)
        right = (drawn == guesses)[:, : T - 1].long().cumprod(1).sum(1, keepdim=True)
        kept = torch.minimum(right + 1, N - self.done)
        end = self.done + T
        later = torch.where(self.given >= 0, self.given, drawn[:, -1:])
        self.tokens.copy_(torch.where(self.places >= end, later, self.tokens))
        self.tokens.scatter_(1, at.clamp(max=self.tokens.shape[1] - 1), drawn)
        self.done += kept
        self.cache.lengths += self.in_every_branch(kept - T)[:, 0]

    def is_done(self, turn: int) -> bool:
        ends = self.done[:, 0] >= self.task.num_tokens
        if self.task.stop is not None:
            ends |= (self.tokens.eq(self.task.stop) & (self.places < self.done)).any(1)
        return bool(ends.all())

    def report(self) -> None:
        if self.options.on_step is not None:
            drawn = int(self.done.sum())
            self.options.on_step(drawn - self.counted)
            self.counted = drawn
        if self.task.on_tokens is not None:
            self.task.on_tokens(self.result())

    def result(self) -> Tensor:
        """Guesses that are not verified do not count as drawn."""
        drawn = self.tokens.masked_fill(self.places >= self.done, -1)[:, : self.task.num_tokens]
        return drawn if self.task.stop is None else drawn.masked_fill(drawn < 0, self.task.stop)
