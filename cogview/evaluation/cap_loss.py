# SPDX-License-Identifier: Apache-2.0
"""CapLoss: how well a text describes an image, as the model itself sees it.

Source: CogView, arXiv:2105.13290 (self-reranking) and the released code.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cogview.generation.engine import score
from cogview.model.transformer import CogView
from cogview.tokens.sequence import image_to_text_prompt
from cogview.tokens.vocab import Vocab


def caption_loss(model: CogView, vocab: Vocab, codes: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """Mean negative log-likelihood of a text's tokens given an image; lower is better.

    Args:
        codes: ``[N, num_codes]`` image codes.
        texts: N texts as piece ids, each of at least one token.

    Returns float32 ``[N]`` in nats per token. Image ids take no part in the softmax, as in the released
    scorer; that one sums over tokens, the paper takes the mean, as is done here. Leaves the model in
    eval mode.
    """
    if len(codes) != len(texts):
        raise ValueError(f"texts must have one entry per image ({len(codes)}), got {len(texts)}")
    if any(not text for text in texts):
        raise ValueError("texts must have at least one token each, got an empty one")
    model.eval()
    prompts = [image_to_text_prompt(vocab, row) for row in codes.tolist()]
    ids = range(vocab.text_start, len(model.word_embeddings.weight))
    return score(model, prompts, [[ids.start + piece for piece in text] for text in texts], ids)
