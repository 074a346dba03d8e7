# SPDX-License-Identifier: Apache-2.0
"""A run: the folder that training writes and that generation, captioning and reranking read.

::

    runs/x/
      tokenizers.json              data, sizes and schedule of both tokenizers
      text_tokenizer.model         SentencePiece
      image_tokenizer.safetensors  VQ-VAE
      model.json                   shape of the transformer, its training and sampling
      checkpoints/step-00000400/   weights, optimizer, losses so far
      tensorboard/                 scalars
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cogview.config import SamplingConfig
from cogview.files import StrPath, load_tensors
from cogview.model.transformer import CogView
from cogview.settings import load_model_settings, train_model_hint
from cogview.tokens.tokenizers import Tokenizers, load_tokenizers
from cogview.training.checkpoint import CHECKPOINTS, latest_checkpoint
from cogview.weights import load_weights


@dataclass
class Run:
    """A trained model with all it needs to draw and to read pictures."""

    model: CogView
    tokenizers: Tokenizers
    sampling: SamplingConfig
    max_text_tokens: int


def load_run(folder: StrPath, device: str = "cpu") -> Run:
    """Tokenizers and the latest weights of a run, in eval mode, for generation.

    FileNotFoundError or ValueError, each naming the file and the way out.
    """
    folder = Path(folder)
    tokenizers = load_tokenizers(folder, device)
    settings = load_model_settings(folder)
    checkpoint = latest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} has no checkpoint yet; {train_model_hint(folder)}")
    with torch.device("meta"):
        model = CogView(settings.model)
    model.to_empty(device="cpu")
    weights = checkpoint / "model.safetensors"
    load_weights(model, load_tensors(weights), weights)
    return Run(model.to(device).eval(), tokenizers, settings.sampling, settings.max_text_tokens)
