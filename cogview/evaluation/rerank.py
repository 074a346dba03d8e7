# SPDX-License-Identifier: Apache-2.0
"""Order candidate images of one text by CapLoss: the model judges its own drawings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cogview.evaluation.cap_loss import caption_loss
from cogview.model.transformer import CogView
from cogview.tokens.vocab import Vocab


def rerank(
    model: CogView, vocab: Vocab, texts: Sequence[Sequence[int]], candidates: Tensor
) -> tuple[Tensor, Tensor]:
    """Order of each text's candidates, best first, and their CapLoss.

    Args:
        texts: N texts as piece ids.
        candidates: ``[N, M, num_codes]`` codes, M candidates for each text.

    Returns ``order`` int64 ``[N, M]`` and ``losses`` float32 ``[N, M]``, the latter in the order given.
    """
    N, M, num_codes = candidates.shape
    repeated = [text for text in texts for _ in range(M)]
    losses = caption_loss(model, vocab, candidates.reshape(N * M, num_codes), repeated).view(N, M)
    return losses.argsort(dim=1, stable=True), losses
