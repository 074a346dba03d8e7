# SPDX-License-Identifier: Apache-2.0
"""CLIP-GEN draws: a text's embedding in front, then codes by the one engine, with its cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from cogview.generation.engine import DrawOptions, Rows, Task, decode
from cogview.generation.text_to_image import Candidates
from cogview.model.cache import KVCache
from cogview.model.clip_gen import ClipGen
from cogview.model.decoder import Decoder
from cogview.seeding import derive_seed


@torch.no_grad()
def read_embeddings(model: ClipGen, embeddings: Tensor, rows: list[int], spare: int = 0) -> Rows:
    """Rows that begin with ``embeddings[rows[i]]`` and have room for all codes; each is read once."""
    config = model.config
    weight = model.condition.weight
    cache = KVCache(
        num_layers=config.num_layers,
        batch=len(embeddings),
        num_heads=config.num_heads,
        capacity=1,
        head_size=config.hidden_size // config.num_heads,
        device=weight.device,
        dtype=weight.dtype,
    )
    nothing = torch.empty(len(embeddings), 0, dtype=torch.int64, device=weight.device)
    hidden = model(embeddings.to(weight), nothing, cache=cache)
    index = torch.tensor(rows, device=weight.device)
    taken = cache.take(rows, config.max_positions + spare)
    return Rows(taken, hidden[index, 0], Decoder(model.transformer))


def draw_from_embeddings(
    model: ClipGen, embeddings: Tensor, num_candidates: int, options: DrawOptions
) -> Iterator[Candidates]:
    """Codes of ``num_candidates`` pictures for each embedding ``[M, E]``, batch after batch.

    A picture depends on its embedding, ``options.seed`` and its number, not on its batch. Leaves the model in
    eval mode. ValueError for guidance, which needs a model that was trained without a text as well.
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
    if options.sampling.guidance != 1:
        raise ValueError(f"guidance must be 1 for CLIP-GEN, got {options.sampling.guidance}")
    model.eval()
    config = model.config
    all_rows = itertools.product(range(len(embeddings)), range(num_candidates))
    while rows := list(itertools.islice(all_rows, options.max_batch)):
        places, numbers = [place for place, _ in rows], [number for _, number in rows]
        used = sorted(set(places))
        read = read_embeddings(
            model, embeddings[used], [used.index(place) for place in places], options.parallel - 1
        )
        task = Task(
            allowed=[range(config.vocab_size)],
            num_tokens=config.max_positions,
            seeds=[derive_seed(options.seed, number) for number in numbers],
        )
        yield Candidates(decode(model.transformer, read, task, options), places, numbers)
