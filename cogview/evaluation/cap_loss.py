# SPDX-License-Identifier: Apache-2.0
"""CapLoss: how well a text describes an image, as the model itself sees it.

Source: CogView, arXiv:2105.13290 (self-reranking) and the released code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.model.transformer import CogView
from cogview.tokens.sequence import image_to_text_prompt
from cogview.tokens.vocab import Vocab
from cogview_kernels import linear_cross_entropy


@torch.no_grad()
def caption_loss(
    model: CogView, vocab: Vocab, codes: Tensor, texts: Sequence[Sequence[int]], *, max_batch: int = 256
) -> Tensor:
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
    device = model.word_embeddings.weight.device
    losses = []
    for start in range(0, len(texts), max_batch):
        chunk = texts[start : start + max_batch]
        longest = max(len(text) for text in chunk)
        prompts = [image_to_text_prompt(vocab, row) for row in codes[start : start + max_batch].tolist()]
        text = torch.zeros(len(chunk), longest, dtype=torch.int64)
        is_text = torch.zeros(len(chunk), longest, dtype=torch.bool)
        for index, pieces in enumerate(chunk):
            text[index, : len(pieces)] = vocab.text_start + torch.tensor(pieces)
            is_text[index, : len(pieces)] = True
        text, is_text = text.to(device), is_text.to(device)
        hidden = model(torch.cat([torch.tensor(prompts, device=device), text[:, :-1]], dim=1))
        target = (text - vocab.text_start).masked_fill(~is_text, -100)
        token_loss = linear_cross_entropy(
            hidden[:, -longest:].reshape(-1, hidden.shape[-1]),
            model.word_embeddings.weight[vocab.text_start :],
            target.reshape(-1),
            reduction="none",
        )
        # Padded steps carry the ignored target, hence loss 0.
        losses.append(token_loss.view_as(text).float().sum(1) / is_text.sum(1))
    return torch.cat(losses) if losses else torch.empty(0, dtype=torch.float32, device=device)
