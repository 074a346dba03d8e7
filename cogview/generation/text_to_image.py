# SPDX-License-Identifier: Apache-2.0
"""Texts to image codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.generation.engine import DrawOptions, decode, prefill
from cogview.model.transformer import CogView
from cogview.seeding import derive_seed
from cogview.tokens.sequence import text_to_image_prompt
from cogview.tokens.vocab import Vocab


def generate_codes(
    model: CogView,
    vocab: Vocab,
    prompts: Sequence[Sequence[int]],
    num_codes: int,
    *,
    num_candidates: int = 1,
    options: DrawOptions | None = None,
) -> Tensor:
    """Image codes ``[len(prompts), num_candidates, num_codes]`` for prompts given as piece ids.

    Only image ids can be drawn. A candidate depends on the seed, its prompt's place and its own number,
    not on how candidates are batched. Leaves the model in eval mode.
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
    options = options or DrawOptions()
    model.eval()
    image_ids = [range(vocab.num_image_codes)]
    results = []
    # A batch holds whole prompts with all candidates, or a part of one prompt's candidates.
    prompts_per_batch = max(1, options.max_batch // num_candidates)
    for start in range(0, len(prompts), prompts_per_batch):
        chunk = prompts[start : start + prompts_per_batch]
        read = prefill(model, [text_to_image_prompt(vocab, text, num_codes) for text in chunk], num_codes)
        parts = []
        for first in range(0, num_candidates, options.max_batch):
            count = min(options.max_batch, num_candidates - first)
            seeds = [
                derive_seed(options.seed, start + prompt, first + candidate)
                for prompt in range(len(chunk))
                for candidate in range(count)
            ]
            codes = decode(model, read.repeat(count), image_ids, num_codes, seeds, options)
            parts.append(codes.view(len(chunk), count, num_codes))
        results.append(torch.cat(parts, dim=1))
    if not results:
        device = model.word_embeddings.weight.device
        return torch.empty(0, num_candidates, num_codes, dtype=torch.int64, device=device)
    return torch.cat(results)
