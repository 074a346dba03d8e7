# SPDX-License-Identifier: Apache-2.0
"""Image codes to texts, with the same model.

Source: CogView, arXiv:2105.13290, and the released code.
"""

from __future__ import annotations

from numbers import Integral

from torch import Tensor

from cogview.generation.beam import beam_search
from cogview.generation.engine import GREEDY, DrawOptions, Task, decode, prefill
from cogview.model.transformer import CogView
from cogview.seeding import derive_seed
from cogview.tokens.sequence import image_to_text_prompt
from cogview.tokens.vocab import Vocab

MOST_BEAMS = 100  # Each is a row of the batch; a search gains nothing from so many.


def generate_captions(
    model: CogView,
    vocab: Vocab,
    codes: Tensor,
    *,
    max_text_tokens: int = 20,
    beams: int = 1,
    options: DrawOptions | None = None,
) -> list[list[int]]:
    """Piece ids describing each image of ``codes`` ``[N, num_codes]``.

    Text tokens only, up to SEP or ``max_text_tokens`` of them. Without ``options`` the likeliest token is
    taken at every step, or with ``beams`` above 1 the likeliest text by beam search, which draws nothing.
    Leaves the model in eval mode.
    """
    options = options or DrawOptions(sampling=GREEDY)
    if not isinstance(beams, Integral) or not 1 <= beams <= MOST_BEAMS:
        raise ValueError(f"beams must be a whole number from 1 to {MOST_BEAMS}, got {beams!r}")
    model.eval()
    sep = vocab.command("SEP")
    captions = []
    prompts = [image_to_text_prompt(vocab, row) for row in codes.tolist()]
    rows = max(1, options.max_batch // beams)
    for start in range(0, len(prompts), rows):
        chunk = prompts[start : start + rows]
        task = Task(
            allowed=[range(vocab.text_start, vocab.command_start), range(sep, sep + 1)],
            num_tokens=max_text_tokens,
            seeds=[derive_seed(options.seed, "caption")] * len(chunk),
            stop=sep,
        )
        if beams > 1:
            drawn = beam_search(model, chunk, task, beams, options.on_step)
        else:
            read = prefill(model, chunk, max_text_tokens, spare=options.parallel - 1)
            drawn = decode(model, read, task, options)
        for ids in drawn.tolist():
            end = ids.index(sep) if sep in ids else len(ids)
            captions.append([token - vocab.text_start for token in ids[:end]])
    return captions
