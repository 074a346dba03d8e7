# SPDX-License-Identifier: Apache-2.0
"""Beam search: the texts that are likeliest as a whole, rather than token by token.

Letters: P prompts, K beams of each, V ids that may be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogview.generation.engine import STOP_EVERY, Task, prefill
from cogview.model.transformer import CogView


@torch.no_grad()
def beam_search(
    model: CogView,
    prompts: Sequence[Sequence[int]],
    task: Task,
    beams: int,
    on_step: Callable[[int], object] | None = None,
) -> Tensor:
    """For each prompt the continuation of the highest mean log-likelihood a token that ``beams`` beams find.

    Args:
        prompts: token ids, all equally long.
        task: with a ``stop``, else ValueError; it ends a text and counts as one of its tokens.

    Returns int64 ``[P, task.num_tokens]``, filled with ``stop`` behind the end. FloatingPointError if the
    model's numbers are not finite.
    """
    P, K, N, stop = len(prompts), beams, task.num_tokens, task.stop
    if stop is None:
        raise ValueError("task must have a stop, which ends a text")
    rows = prefill(model, [prompt for prompt in prompts for _ in range(K)], N)
    device, hidden = rows.hidden.device, rows.hidden
    ids = torch.cat([torch.arange(part.start, part.stop, device=device) for part in task.allowed])
    total = torch.zeros(P, K, device=device)
    total[:, 1:] = -torch.inf  # at first the beams of a prompt are alike, so one of them speaks for all
    length = torch.zeros(P, K, device=device)
    ended = torch.zeros(P, K, dtype=torch.bool, device=device)
    tokens = torch.full((P, K, N), stop, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    first_row = torch.arange(P, device=device)[:, None] * K
    for index in range(N):
        logits = torch.cat([model.logits(hidden, part.start, part.stop) for part in task.allowed], dim=-1)
        finite &= logits.isfinite().all()
        log_p = logits.float().log_softmax(-1).view(P, K, -1)
        # A beam that has ended stays as it is, at no cost.
        only_stop = torch.where(ids == stop, 0.0, -torch.inf)
        log_p = torch.where(ended[..., None], only_stop, log_p)
        total, best = (total[..., None] + log_p).flatten(1).topk(K)
        beam, choice = best // len(ids), ids[best % len(ids)]
        tokens = tokens.gather(1, beam[..., None].expand(-1, -1, N))
        tokens[..., index] = choice
        ended, length = ended.gather(1, beam), length.gather(1, beam)
        length = length + ~ended
        ended = ended | (choice == stop)
        if on_step is not None:
            on_step(P)
        if index == N - 1 or (index % STOP_EVERY == STOP_EVERY - 1 and bool(ended.all())):
            break
        rows.cache.reorder((first_row + beam).flatten(), first=len(prompts[0]))
        hidden = rows.step(choice.view(-1, 1), rows.cache)[:, -1]
    if not bool(finite):
        raise FloatingPointError("the model's logits are not finite (NaN or infinite)")
    winner = (total / length).argmax(1)
    return tokens[torch.arange(P, device=device), winner]
