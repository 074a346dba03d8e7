# SPDX-License-Identifier: Apache-2.0
"""Small models and runs shared by the tests of the model package."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cogview.config import ModelConfig, Preset, ThreeRegionConfig
from cogview.model.transformer import CogView
from cogview.presets import PRESETS
from cogview.tokens.sequence import image_to_text_prompt
from cogview.tokens.vocab import Vocab

VOCAB = Vocab(num_image_codes=16, num_text_pieces=20)
SMALL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    num_heads=2,
    vocab_size=VOCAB.padded_size,
    max_positions=40,
    dropout=0.0,
    three_region=ThreeRegionConfig(block_size=4, window_blocks=2, num_pivots=12),
)


def small_model(seed: int = 0, scale: float = 1.0, **changes: object) -> CogView:
    """A model of two layers. ``scale`` enlarges its weights, so that every part of it matters."""
    torch.manual_seed(seed)
    model = CogView(dataclasses.replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(scale)
    return model


def tiny_preset(steps: int = 6) -> Preset:
    """The digits preset with next to no training."""
    preset = PRESETS["digits"]
    return dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, num_layers=2, hidden_size=64, num_heads=2),
        train=dataclasses.replace(preset.train, steps=steps, batch_size=8, checkpoint_every=3),
        image_tokenizer=dataclasses.replace(preset.image_tokenizer, channels=16),
        image_tokenizer_train=dataclasses.replace(
            # Enough that pictures do not all have the same codes.
            preset.image_tokenizer_train,
            steps=60,
            batch_size=16,
            checkpoint_every=20,
        ),
    )


def heed_signals() -> None:
    """In a new process: what a shell starts in the background ignores Ctrl-C, and nohup SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def save_photos(folder: Path) -> None:
    """Six pictures with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    lines = [f"{index}.png\ta photo of thing number {index}" for index in range(6)]
    (folder / "captions.tsv").write_text("\n".join(lines))


def naive_caption_loss(model: CogView, codes: Tensor, text: list[int]) -> Tensor:
    """Mean over the text, log-softmax over all but image ids, one row at a time."""
    prompt = image_to_text_prompt(VOCAB, codes.tolist())
    ids = [VOCAB.text_start + piece for piece in text]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([prompt + ids])))[0]
    logits[:, : VOCAB.num_image_codes] = -torch.inf
    first = len(prompt) - 1
    return F.cross_entropy(logits[first : first + len(ids)], torch.tensor(ids))


def die_in_step(number, monkeypatch, module):
    """Let a training that takes its batches from ``module.batch_indices`` raise "killed" in a step."""
    real = module.batch_indices

    def dies(seed, step, *arguments):
        if step == number:
            raise RuntimeError("killed")
        return real(seed, step, *arguments)

    monkeypatch.setattr(module, "batch_indices", dies)
