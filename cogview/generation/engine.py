# SPDX-License-Identifier: Apache-2.0
"""The one loop that draws tokens: read all prompts at once, then add one token to every row at a time.

Letters: B rows, C model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cogview.config import SamplingConfig
from cogview.generation.sampling import draw, row_uniforms, token_probabilities
from cogview.model.cache import KVCache
from cogview.model.transformer import CogView


@dataclass(frozen=True)
class DrawOptions:
    """How tokens are drawn. ``sampling`` None takes the likeliest token at every step."""

    sampling: SamplingConfig | None = field(default_factory=SamplingConfig)
    seed: int = 0
    max_batch: int = 256  # rows that are decoded together
    on_step: Callable[[int], object] | None = None  # called with the number of tokens just drawn

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {self.max_batch}")


class Rows(NamedTuple):
    """Rows that the model has read so far."""

    cache: KVCache  # keys and values of their tokens
    hidden: Tensor  # [B, C], the final hidden state of each row's last token

    def repeat(self, count: int) -> Rows:
        """Every row ``count`` times in sequence: one prefill serves many candidates."""
        return Rows(self.cache.repeat(count), self.hidden.repeat_interleave(count, dim=0))


@torch.no_grad()
def prefill(model: CogView, prompts: Sequence[Sequence[int]], new_tokens: int) -> Rows:
    """Read prompts of any lengths in one batch, with room for ``new_tokens`` more per row.

    ValueError if the longest prompt and the new tokens exceed the model's positions.
    """
    config = model.config
    device = model.word_embeddings.weight.device
    longest = max(len(prompt) for prompt in prompts)
    if longest + new_tokens > config.max_positions:
        excess = longest + new_tokens - config.max_positions
        raise ValueError(
            f"the prompt has {longest} tokens and {new_tokens} are to follow, but the model has "
            f"{config.max_positions} positions; shorten the text by {excess}"
        )
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    cache = KVCache(
        *(config.num_layers, len(prompts), config.num_heads),
        *(longest + new_tokens, config.hidden_size // config.num_heads),
        device=device,
        dtype=model.word_embeddings.weight.dtype,
    )
    # Padding stands behind the prompts, where causal attention never looks back at it.
    hidden = model(tokens.to(device), cache=cache)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache.set_lengths(lengths)
    return Rows(cache, hidden[torch.arange(len(prompts), device=device), lengths - 1])


@torch.no_grad()
def step(model: CogView, rows: Rows, tokens: Tensor) -> Rows:
    """The rows with one more token each, ids ``[B]``."""
    return Rows(rows.cache, model(tokens[:, None], cache=rows.cache)[:, -1])


@torch.no_grad()
def decode(
    model: CogView,
    rows: Rows,
    allowed: Sequence[range],
    num_tokens: int,
    seeds: Sequence[int],
    options: DrawOptions,
) -> Tensor:
    """Draw ``num_tokens`` more tokens for every row; ids, int64 ``[B, num_tokens]``.

    Args:
        allowed: the ids that may be drawn; the logits of no others are computed.
        seeds: one for each row, so that a row's outcome does not depend on the other rows.
    """
    device = rows.hidden.device
    ids = torch.cat([torch.arange(part.start, part.stop, device=device) for part in allowed])
    uniforms = row_uniforms(seeds, num_tokens).to(device)
    tokens = torch.empty(len(seeds), num_tokens, dtype=torch.int64, device=device)
    for index in range(num_tokens):
        if index > 0:
            rows = step(model, rows, tokens[:, index - 1])
        parts = [model.logits(rows.hidden, part.start, part.stop) for part in allowed]
        logits = torch.cat(parts, dim=-1)
        if options.sampling is None:
            choice = logits.argmax(-1)
        else:
            choice = draw(token_probabilities(logits, options.sampling), uniforms[:, index])
        tokens[:, index] = ids[choice]
        if options.on_step is not None:
            options.on_step(len(seeds))
    return tokens
