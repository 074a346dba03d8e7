# SPDX-License-Identifier: Apache-2.0
"""Text to image codes: one prefill for all prompts, then one cached step per code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogview.config import SamplingConfig
from cogview.generation.sampling import draw, row_uniforms, token_probabilities
from cogview.model.cache import KVCache
from cogview.model.transformer import CogView
from cogview.seeding import derive_seed
from cogview.tokens.sequence import text_to_image_prompt
from cogview.tokens.vocab import Vocab


@torch.no_grad()
def prefill(model: CogView, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[KVCache, Tensor]:
    """Run prompts of any lengths in one batch.

    Returns the cache, with room for ``new_tokens`` more per row, and each row's last hidden state
    ``[B, C]``. ValueError if the longest prompt and the new tokens exceed the model's positions.
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
    return cache, hidden[torch.arange(len(prompts), device=device), lengths - 1]


@torch.no_grad()
def generate_codes(
    model: CogView,
    vocab: Vocab,
    prompts: Sequence[Sequence[int]],
    num_codes: int,
    *,
    num_candidates: int = 1,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    max_batch: int = 256,
    on_step: Callable[[int], object] | None = None,
) -> Tensor:
    """Image codes ``[len(prompts), num_candidates, num_codes]`` for prompts given as piece ids.

    Only image ids can be drawn, and only their logits are computed. A candidate depends on ``seed``, its
    prompt's place and its own number, not on how candidates are batched. ``on_step`` is called with the
    number of codes just drawn. Leaves the model in eval mode.
    """
    sampling = sampling or SamplingConfig()
    model.eval()
    device = model.word_embeddings.weight.device
    if num_candidates < 1 or max_batch < 1:
        raise ValueError(
            f"num_candidates and max_batch must be at least 1, got {num_candidates}, {max_batch}"
        )
    results = []
    # A batch holds whole prompts with all candidates, or a part of one prompt's candidates.
    prompts_per_batch = max(1, max_batch // num_candidates)
    for start in range(0, len(prompts), prompts_per_batch):
        chunk = prompts[start : start + prompts_per_batch]
        rows = [text_to_image_prompt(vocab, pieces, num_codes) for pieces in chunk]
        prompt_cache, prompt_hidden = prefill(model, rows, num_codes)
        parts = []
        for first in range(0, num_candidates, max_batch):
            count = min(max_batch, num_candidates - first)
            seeds = [
                derive_seed(seed, start + prompt, first + candidate)
                for prompt in range(len(chunk))
                for candidate in range(count)
            ]
            uniforms = row_uniforms(seeds, num_codes).to(device)
            cache, hidden = prompt_cache.repeat(count), prompt_hidden.repeat_interleave(count, dim=0)
            codes = torch.empty(len(seeds), num_codes, dtype=torch.int64, device=device)
            for step in range(num_codes):
                probabilities = token_probabilities(model.logits(hidden, 0, vocab.num_image_codes), sampling)
                codes[:, step] = draw(probabilities, uniforms[:, step])
                if step + 1 < num_codes:
                    hidden = model(codes[:, step : step + 1], cache=cache)[:, -1]
                if on_step is not None:
                    on_step(len(seeds))
            parts.append(codes.view(len(chunk), count, num_codes))
        results.append(torch.cat(parts, dim=1))
    if not results:
        return torch.empty(0, num_candidates, num_codes, dtype=torch.int64, device=device)
    return torch.cat(results)
