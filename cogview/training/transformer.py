# SPDX-License-Identifier: Apache-2.0
"""Training loop of the transformer."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cogview.config import ModelConfig, TrainConfig
from cogview.data.tokens import TokenDataset
from cogview.model.transformer import CogView
from cogview.seeding import derive_seed
from cogview.tokens.sequence import Batch
from cogview.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from cogview.training.interrupt import DeferredInterrupt
from cogview.training.optim import learning_rate, make_optimizer
from cogview_kernels import ThreeRegionLayout, linear_cross_entropy


def sample_layouts(
    config: ModelConfig, batch: Batch, generator: torch.Generator
) -> list[ThreeRegionLayout] | None:
    """One three-region layout per layer, drawn anew; None if the model trains with dense attention.

    Padding takes pivots as text does (only padding sees it), so every row has the same number of image
    pivots. The released code gives rows of less text more of them; in image-to-text order the model then
    reads the length of the coming text off their number, and is lost without it when it captions.
    """
    if config.three_region is None:
        return None
    return [
        ThreeRegionLayout.sample(
            batch.text_mask | ~batch.valid_mask,
            config.three_region.num_pivots,
            block_size=config.three_region.block_size,
            window_blocks=config.three_region.window_blocks,
            density_correction=config.three_region.density_correction,
            generator=generator,
        )
        for _ in range(config.num_layers)
    ]


def losses_of(
    model: CogView, batch: Batch, layouts: list[ThreeRegionLayout] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean loss to train on, and the plain means after image codes and after other tokens.

    One pass of per-token losses gives all three. Nats per token.
    """
    hidden = model(batch.tokens, layout=layouts)
    token_loss = linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        model.word_embeddings.weight,
        batch.targets.reshape(-1),
        reduction="none",
    ).view_as(batch.weight)
    loss = (token_loss * batch.weight).sum() / batch.weight.sum()
    has_target = batch.weight > 0
    after_image, after_text = has_target & ~batch.text_mask, has_target & batch.text_mask
    detached = token_loss.detach()
    image_loss = (detached * after_image).sum() / after_image.sum()
    text_loss = (detached * after_text).sum() / after_text.sum().clamp(min=1)
    return loss, image_loss, text_loss


def train(
    model: CogView,
    dataset: TokenDataset,
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train ``model`` in place, resuming from the latest checkpoint under ``out`` if there is one.

    Everything random in a step follows from (seed, step): its rows, their order, its layouts and its
    dropout. With the saved weights and optimizer state a resumed run therefore repeats the losses of an
    uninterrupted one. A step whose loss or gradient is not finite changes nothing. Seeds PyTorch's
    global generators.

    Writes ``out/checkpoints`` and TensorBoard scalars to ``out/tensorboard``. On Ctrl-C, finishes the
    step, saves and raises KeyboardInterrupt. Returns the history: ``image_loss``, ``text_loss``,
    ``learning_rate``, one value per step.
    """
    out = Path(out)
    device = model.word_embeddings.weight.device
    optimizer = make_optimizer(model, config)
    history: dict[str, list[float]] = {"image_loss": [], "text_loss": [], "learning_rate": []}
    start = 0
    saved = latest_checkpoint(out / "checkpoints")
    if saved is not None:
        start, history = load_checkpoint(saved, model, optimizer)
    model.train()
    layout_generator = torch.Generator(device=device)
    bar = tqdm(
        total=config.steps, initial=min(start, config.steps), desc="train", unit="step", disable=not progress
    )
    with (
        SummaryWriter(str(out / "tensorboard"), purge_step=start) as board,
        DeferredInterrupt() as interrupt,
        bar,
    ):
        for step in range(start, config.steps):
            torch.manual_seed(derive_seed(config.seed, "dropout", step))
            layout_generator.manual_seed(derive_seed(config.seed, "layouts", step))
            batch = dataset.batch(
                step,
                config.batch_size,
                text_weight=config.text_weight,
                caption_fraction=config.caption_fraction,
                seed=config.seed,
            ).to(device)
            rate = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate

            loss, image_loss, text_loss = losses_of(
                model, batch, sample_layouts(model.config, batch, layout_generator)
            )
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            if torch.isfinite(loss) and torch.isfinite(norm):
                optimizer.step()
            else:
                bar.write(f"step {step}: loss {loss.item()}, gradient norm {norm.item()}; step skipped")
            optimizer.zero_grad(set_to_none=True)

            values = {
                "image_loss": image_loss.item(),
                "text_loss": text_loss.item(),
                "learning_rate": rate,
            }
            for name, value in values.items():
                history[name].append(value)
                board.add_scalar(f"train/{name}", value, step)
            board.add_scalar("train/gradient_norm", norm.item(), step)
            bar.set_postfix(image=f"{values['image_loss']:.3f}", text=f"{values['text_loss']:.3f}")
            bar.update()

            done = step + 1
            if done % config.checkpoint_every == 0 or done == config.steps or interrupt.requested:
                save_checkpoint(out / "checkpoints", done, model, optimizer, history)
            if interrupt.requested:
                raise KeyboardInterrupt
    model.eval()
    return history
