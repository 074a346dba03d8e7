# SPDX-License-Identifier: Apache-2.0
"""Image codes to texts, with the same model.

Source: CogView, arXiv:2105.13290, and the released code.
"""

from __future__ import annotations

from torch import Tensor

from cogview.generation.engine import DrawOptions, decode, prefill
from cogview.model.transformer import CogView
from cogview.seeding import derive_seed
from cogview.tokens.sequence import image_to_text_prompt
from cogview.tokens.vocab import Vocab


def generate_captions(
    model: CogView,
    vocab: Vocab,
    codes: Tensor,
    *,
    max_text_tokens: int = 20,
    options: DrawOptions | None = None,
) -> list[list[int]]:
    """Piece ids describing each image of ``codes`` ``[N, num_codes]``.

    Text tokens only, up to SEP or ``max_text_tokens`` of them. Without ``options`` the likeliest token is
    taken at every step. Leaves the model in eval mode.
    """
    options = options or DrawOptions(sampling=None)
    model.eval()
    sep = vocab.command("SEP")
    text_ids = [range(vocab.text_start, vocab.command_start), range(sep, sep + 1)]
    captions = []
    prompts = [image_to_text_prompt(vocab, row) for row in codes.tolist()]
    for start in range(0, len(prompts), options.max_batch):
        chunk = prompts[start : start + options.max_batch]
        seeds = [derive_seed(options.seed, start + row) for row in range(len(chunk))]
        read = prefill(model, chunk, max_text_tokens)
        for ids in decode(model, read, text_ids, max_text_tokens, seeds, options).tolist():
            end = ids.index(sep) if sep in ids else len(ids)
            captions.append([token - vocab.text_start for token in ids[:end]])
    return captions
