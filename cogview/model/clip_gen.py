# SPDX-License-Identifier: Apache-2.0
"""CLIP-GEN's model: the transformer over the codes of a picture, with an embedding of CLIP in front.

Source: Wang et al., CLIP-GEN, arXiv:2203.00386. In training the embedding is that of the picture itself, when
drawing that of a text. Letters: B rows, N codes of a picture, E numbers of an embedding, C width.
"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import ImageTokenizerConfig, ModelConfig
from cogview.model.cache import KVCache
from cogview.model.transformer import DTYPE, CogView
from cogview_kernels import ThreeRegionLayout


def clip_gen_config(model: ModelConfig, tokenizer: ImageTokenizerConfig) -> ModelConfig:
    """``model`` with the codes of the tokenizer as its whole vocabulary, and a position for each."""
    return dataclasses.replace(model, vocab_size=tokenizer.num_codes, max_positions=tokenizer.codes_per_image)


class ClipGen(nn.Module):
    """Embeddings to the likelihood of codes.

    Args:
        config: as :func:`clip_gen_config` gives it.
        embedding_width: E.
    """

    def __init__(self, config: ModelConfig, embedding_width: int) -> None:
        super().__init__()
        self.config = config
        self.transformer = CogView(config)
        self.condition = nn.Linear(embedding_width, config.hidden_size, dtype=DTYPE)
        nn.init.zeros_(self.condition.bias)
        # An embedding has length 1, so that this gives a vector as long as those of the codes.
        nn.init.normal_(self.condition.weight, std=config.init_std)

    def forward(
        self,
        embeddings: Tensor,
        codes: Tensor,
        *,
        layout: list[ThreeRegionLayout] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states ``[B, 1 + T, C]`` behind embeddings ``[B, E]`` and the first codes ``[B, T]``.

        The state in place i tells of code i.
        """
        tokens = F.pad(codes, (1, 0))  # The embedding takes the place of the first.
        return self.transformer(tokens, layout=layout, cache=cache, first_word=self.condition(embeddings))
