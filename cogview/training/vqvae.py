# SPDX-License-Identifier: Apache-2.0
"""Training loop of the VQ-VAE image tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cogview.config import ImageTokenizerTrainConfig
from cogview.data.order import batch_indices
from cogview.data.pairs import Pairs
from cogview.seeding import derive_seed
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from cogview.training.interrupt import DeferredInterrupt


def train_image_tokenizer(
    tokenizer: ImageTokenizer,
    pairs: Pairs,
    config: ImageTokenizerTrainConfig,
    out: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train ``tokenizer`` in place on the images of ``pairs``, resuming from ``out/tokenizer-checkpoints``.

    Loss: pixel MSE (in [0, 1]) plus ``commitment`` times the commitment term; Adam, cosine to zero.
    Randomness follows from (seed, step), so a resumed run repeats the losses of an uninterrupted one. A
    step whose loss is not finite changes nothing. Seeds PyTorch's global generators. Returns the history:
    ``reconstruction`` (MSE) and ``codes_used`` (distinct codes in the batch) per step.
    """
    out = Path(out)
    device = next(tokenizer.parameters()).device
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=config.learning_rate, fused=True)
    schedule = 0.5 * (1 + torch.cos(torch.linspace(0, torch.pi, config.steps + 1)))
    history: dict[str, list[float]] = {"reconstruction": [], "codes_used": []}
    start = 0
    saved = latest_checkpoint(out / "tokenizer-checkpoints")
    if saved is not None:
        start, history = load_checkpoint(saved, tokenizer, optimizer)
    tokenizer.train()
    size = tokenizer.config.image_size
    bar = tqdm(
        total=config.steps,
        initial=min(start, config.steps),
        desc="train image tokenizer",
        unit="step",
        disable=not progress,
    )
    with (
        SummaryWriter(str(out / "tensorboard"), purge_step=start) as board,
        DeferredInterrupt() as interrupt,
        bar,
    ):
        for step in range(start, config.steps):
            torch.manual_seed(derive_seed(config.seed, "image tokenizer", step))
            indices = batch_indices(config.seed, step, config.batch_size, len(pairs))
            images = torch.stack([pairs.image(index, size) for index in indices]).to(device)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * float(schedule[step])

            book = {name: buffer.clone() for name, buffer in tokenizer.quantize_t.named_buffers()}
            result = tokenizer(images)
            reconstruction = F.mse_loss(result.images, images)
            loss = reconstruction + config.commitment * result.commitment
            if torch.isfinite(loss):
                loss.backward()
                optimizer.step()
            else:
                # The forward pass has already moved the codebook: put it back.
                for name, buffer in tokenizer.quantize_t.named_buffers():
                    buffer.copy_(book[name])
                bar.write(f"step {step}: loss {loss.item()}; step skipped")
            optimizer.zero_grad(set_to_none=True)

            values = {
                "reconstruction": reconstruction.item(),
                "codes_used": float(len(result.codes.unique())),
            }
            for name, value in values.items():
                history[name].append(value)
                board.add_scalar(f"image_tokenizer/{name}", value, step)
            bar.set_postfix(mse=f"{values['reconstruction']:.5f}", codes=int(values["codes_used"]))
            bar.update()

            done = step + 1
            if done % config.checkpoint_every == 0 or done == config.steps or interrupt.requested:
                save_checkpoint(out / "tokenizer-checkpoints", done, tokenizer, optimizer, history)
            if interrupt.requested:
                raise KeyboardInterrupt
    tokenizer.eval()
    return history
