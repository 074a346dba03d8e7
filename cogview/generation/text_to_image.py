# SPDX-License-Identifier: Apache-2.0
"""Texts to image codes; with some codes given, the rest of a picture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cogview.generation.engine import DrawOptions, Task, decode, prefill
from cogview.model.transformer import CogView
from cogview.seeding import derive_seed
from cogview.tokens.sequence import text_to_image_prompt
from cogview.tokens.vocab import Vocab


class Request(NamedTuple):
    """A text whose pictures are drawn."""

    pieces: Sequence[int]
    seed: int = 0  # with a candidate's number, all that its outcome depends on
    given: Tensor | None = None  # int64 [num_codes] on the CPU: codes that are kept, -1 where one is drawn
    first: int = 0  # the number of its first picture


class Candidates(NamedTuple):
    """What a batch drew: codes ``[n, num_codes]`` (-1: not drawn yet), and of what each row is a picture."""

    codes: Tensor
    requests: list[int]  # [n] places of the requests
    numbers: list[int]  # [n] which candidate of its text and seed a row is, from 0


@dataclass(frozen=True)
class _Teller:
    """Tells what there is of a batch, with the codes ``begun`` that its pictures began with."""

    on_codes: Callable[[Candidates], object]
    requests: list[int]
    numbers: list[int]
    begun: Tensor

    def __call__(self, drawn: Tensor) -> None:
        codes = torch.cat([self.begun.to(drawn), drawn], dim=1)
        self.on_codes(Candidates(codes, self.requests, self.numbers))


def draw_candidates(
    model: CogView,
    vocab: Vocab,
    requests: Sequence[Request],
    num_codes: int,
    num_candidates: int,
    options: DrawOptions,
    on_codes: Callable[[Candidates], object] | None = None,
) -> Iterator[Candidates]:
    """Batch after batch of pictures, each as soon as it is drawn.

    Only image ids can be drawn. A picture depends on its request and its number, not on what else is in
    its batch. ``options.seed`` plays no part. ``on_codes`` is called after every step with what there is of
    the batch. Leaves the model in eval mode.
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
    model.eval()
    branches = options.sampling.branches
    all_rows = (
        (place, request.first + number)
        for place, request in enumerate(requests)
        for number in range(num_candidates)
    )
    while rows := list(itertools.islice(all_rows, max(1, options.max_batch // branches))):
        places, numbers = [place for place, _ in rows], [number for _, number in rows]
        given = _given(requests, places, num_codes)
        # Codes that begin every picture of the batch need not be drawn one by one.
        ahead = 0 if given is None else int((given >= 0).all(0).long().cumprod(0).sum())
        ahead = min(ahead, num_codes - 1)
        texts = [requests[place].pieces for place in places] + [()] * (len(rows) * (branches - 1))
        prompts = [text_to_image_prompt(vocab, text, num_codes) for text in texts]
        begun = torch.empty(len(rows), 0, device="cpu") if given is None else given[:, :ahead]
        prompts = [
            [*prompt, *codes] for prompt, codes in zip(prompts, begun.tolist() * branches, strict=True)
        ]
        task = Task(
            allowed=[range(vocab.num_image_codes)],
            num_tokens=num_codes - ahead,
            seeds=[derive_seed(requests[place].seed, number) for place, number in rows],
            given=None if given is None else given[:, ahead:],
            first=ahead,
            on_tokens=None if on_codes is None else _Teller(on_codes, places, numbers, begun),
        )
        if ahead and options.on_step is not None:
            options.on_step(ahead * len(rows))
        read = prefill(model, prompts, num_codes - ahead, spare=options.parallel - 1)
        codes = decode(model, read, task, options)
        yield Candidates(torch.cat([begun.to(codes), codes], dim=1), places, numbers)


def _given(requests: Sequence[Request], places: Sequence[int], num_codes: int) -> Tensor | None:
    """The given codes of a batch ``[n, num_codes]``; None where nothing is given."""
    if all(requests[place].given is None for place in places):
        return None
    nothing = torch.full((num_codes,), -1, device="cpu")
    parts = [requests[place].given for place in places]
    return torch.stack([nothing if part is None else part for part in parts])


def generate_codes(
    model: CogView,
    vocab: Vocab,
    prompts: Sequence[Sequence[int]],
    num_codes: int,
    *,
    num_candidates: int = 1,
    seeds: Sequence[int] | None = None,
    options: DrawOptions | None = None,
) -> Tensor:
    """Image codes ``[len(prompts), num_candidates, num_codes]`` for prompts given as piece ids.

    ``seeds``: one for each prompt; by default ``options.seed`` for all. See :func:`draw_candidates`.
    """
    options = options or DrawOptions()
    seeds = [options.seed] * len(prompts) if seeds is None else seeds
    requests = [Request(text, seed) for text, seed in zip(prompts, seeds, strict=True)]
    batches = draw_candidates(model, vocab, requests, num_codes, num_candidates, options)
    device = model.word_embeddings.weight.device
    nothing = torch.empty(0, num_codes, dtype=torch.int64, device=device)
    codes = torch.cat([nothing, *(batch.codes for batch in batches)])
    return codes.view(len(prompts), num_candidates, num_codes)
