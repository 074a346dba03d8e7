# SPDX-License-Identifier: Apache-2.0
"""Image to text with the same model, and CapLoss: how well a text describes an image.

Source: CogView, arXiv:2105.13290 (self-reranking) and the released code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.config import SamplingConfig
from cogview.generation.sampling import draw, row_uniforms, token_probabilities
from cogview.generation.text_to_image import prefill
from cogview.model.transformer import CogView
from cogview.seeding import derive_seed
from cogview.tokens.sequence import image_to_text_prompt
from cogview.tokens.vocab import Vocab
from cogview_kernels import linear_cross_entropy


@torch.no_grad()
def caption_loss(
    model: CogView, vocab: Vocab, codes: Tensor, texts: Sequence[Sequence[int]], *, max_batch: int = 256
) -> Tensor:
    """CapLoss: mean negative log-likelihood of a text's tokens given an image; lower is better.

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
    return torch.cat(losses) if losses else torch.empty(0, device=device)


@torch.no_grad()
def generate_captions(
    model: CogView,
    vocab: Vocab,
    codes: Tensor,
    *,
    max_text_tokens: int = 20,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Piece ids describing each image of ``codes`` ``[N, num_codes]``.

    Text tokens only, up to SEP or ``max_text_tokens`` of them. Greedy unless ``sampling`` is given.
    Leaves the model in eval mode.
    """
    model.eval()
    device = model.word_embeddings.weight.device
    prompts = [image_to_text_prompt(vocab, row) for row in codes.tolist()]
    if not prompts:
        return []
    cache, hidden = prefill(model, prompts, max_text_tokens)
    sep = vocab.command("SEP")
    uniforms = row_uniforms([derive_seed(seed, row) for row in range(len(prompts))], max_text_tokens).to(
        device
    )
    tokens = torch.empty(len(prompts), max_text_tokens, dtype=torch.int64, device=device)
    for step in range(max_text_tokens):
        text_logits = model.logits(hidden, vocab.text_start, vocab.command_start)
        allowed = torch.cat([text_logits, model.logits(hidden, sep, sep + 1)], dim=-1)
        if sampling is None:
            choice = allowed.argmax(-1)
        else:
            choice = draw(token_probabilities(allowed, sampling), uniforms[:, step])
        tokens[:, step] = choice
        if step + 1 < max_text_tokens:
            ids = torch.where(choice == vocab.num_text_pieces, sep, vocab.text_start + choice)
            hidden = model(ids[:, None], cache=cache)[:, -1]
    captions = []
    for row in tokens.tolist():
        end = row.index(vocab.num_text_pieces) if vocab.num_text_pieces in row else len(row)
        captions.append(row[:end])
    return captions
