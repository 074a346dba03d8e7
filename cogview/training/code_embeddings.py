# SPDX-License-Identifier: Apache-2.0
"""Word embeddings of image codes that begin where the image tokenizer has put the codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

OWN_SHARE = 0.3  # of each embedding that stays its own, so that codes that nearly agree can be told apart


@torch.no_grad()
def begin_like_codebook(embeddings: nn.Embedding, codebook: Tensor) -> None:
    """Give codes that look alike word embeddings that are alike, before training.

    A code is a number without meaning to a transformer that begins at random: it learns from the data alone
    that two of them show the same edge in two colours. The codebook knows. With K codes of the vectors
    ``codebook`` ``[K, D]``, centred, ``U S V^T`` their singular value decomposition and Q a random rotation
    into the C dimensions of the model::

        embeddings[:K] = sqrt(1 - OWN_SHARE^2) * rescaled(U S^0.5 Q) + OWN_SHARE * embeddings[:K]

    where ``rescaled`` gives the standard deviation that ``embeddings[:K]`` have had, and keep. The
    square root of S lets fine differences count for more than they do in the picture. Of more than C
    dimensions, the C largest are taken. Q is drawn by PyTorch's global generator.
    """
    codes, width = codebook.shape[0], embeddings.embedding_dim
    weight = embeddings.weight[:codes]
    vectors = codebook.to(weight.device, torch.float32)
    left, sizes, _ = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    kept = min(width, sizes.numel())
    rotation = torch.linalg.qr(torch.randn(width, kept, dtype=torch.float32, device="cpu")).Q.t()
    like = (left[:, :kept] * sizes[:kept].sqrt()) @ rotation.to(weight.device)
    std = weight.std()
    weight.mul_(OWN_SHARE).add_(like * (std / like.std().clamp(min=1e-12) * (1 - OWN_SHARE**2) ** 0.5))
