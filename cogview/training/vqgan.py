# SPDX-License-Identifier: Apache-2.0
"""Training of the VQGAN image tokenizer, and of the discriminator against which it plays.

Source: Esser, Rombach and Ommer, arXiv:2012.09841, and taming-transformers. Both play on the same pictures in
each step, first the tokenizer. The tokenizer's loss is the mean absolute error of pixels, a perceptual
distance, with ``color_weight`` the error of the cells' mean colours, the commitment to its codes and, from a
step on, how little it fools the discriminator. The last counts as much as what compares pictures at the
decoder's last layer: the ratio of gradients is its weight. Features of a network hardly tell one plain colour
from another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import ImageTokenizerTrainConfig
from cogview.data.pairs import Pairs
from cogview.perception.distance import perceptual_distance
from cogview.tokens.vqgan import VQGAN
from cogview.tokens.vqvae import count_used
from cogview.training.discriminator import PatchDiscriminator, fooling_loss, hinge_loss
from cogview.training.loop import Descent, StepResult, backward, descend
from cogview.training.precision import Precision
from cogview.training.vqvae import ImageTokenizerTrainer

MOST = 1e4  # the weight that adapts, at most
EPS = 1e-4  # added to the gradient that it divides by


class Players(nn.Module):
    """Both networks of the training, as a checkpoint keeps them."""

    def __init__(self, tokenizer: VQGAN, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.tokenizer, self.discriminator = tokenizer, discriminator


class _Pictures(NamedTuple):
    """What the tokenizer made of a batch, and what it is told about it."""

    rebuilt: Tensor
    absolute: Tensor
    perceptual: Tensor


class VQGANTrainer(ImageTokenizerTrainer):
    """Two players, each with its Adam and, in fp16, its loss scale; a cosine to zero for both.

    ``reconstruction`` is the mean squared error of pixels, for comparison with a VQ-VAE. ``fooling``,
    ``discriminator`` and ``adaptive_weight`` are 0 before the discriminator plays.

    Raises:
        ValueError: pictures that are too small for the discriminator, or a device that cannot compute in the
            precision.
        ModuleNotFoundError: the perceptual network's package is not installed.
    """

    label = "train VQGAN"
    recorded = ("reconstruction", "codes_used", "perceptual", "fooling", "discriminator", "adaptive_weight")
    betas = (0.5, 0.9)

    def __init__(
        self, tokenizer: VQGAN, pairs: Pairs, config: ImageTokenizerTrainConfig, workers: int = 0
    ) -> None:
        assert config.vqgan is not None
        super().__init__(tokenizer, pairs, config, workers)
        self.tokenizer: VQGAN = tokenizer
        self.game = config.vqgan
        size = tokenizer.config.image_size
        if size < self.game.smallest_image:
            raise ValueError(
                f"image_size must be at least {self.game.smallest_image} for a discriminator of "
                f"{self.game.discriminator_layers} layers, got {size}; give fewer discriminator_layers"
            )
        discriminator = PatchDiscriminator(self.game.discriminator_channels, self.game.discriminator_layers)
        self.discriminator = discriminator.to(self.device)
        self.model = Players(tokenizer, self.discriminator)
        learned = list(self.discriminator.parameters())
        self.optimizers = {**self.optimizers, "discriminator_optimizer": self.adam(learned)}
        self.precisions["discriminator_optimizer"] = Precision(config.precision, self.device)
        self.perceptual = None
        if self.game.perceptual:
            self.perceptual = perceptual_distance(self.game.lpips, size).to(self.device)

    def step(self, step: int, batch: Tensor) -> StepResult:
        images = batch.to(self.device)
        book = self.prepare(step, images)
        plays = step >= self.game.discriminator_start
        precision = self.precisions["optimizer"]
        with precision.autocast():
            result = self.tokenizer(images, quantise=step >= self.config.warmup_steps)
        pictures = self._compare(result.images.float(), images)
        told = pictures.absolute + self.game.perceptual * pictures.perceptual
        if self.config.color_weight:
            told = told + self.config.color_weight * self.color_error(pictures.rebuilt, images)
        loss = told + self.config.commitment * result.commitment + result.codebook
        fooling = weight = torch.zeros_like(loss)
        if plays:
            fooling, weight = self._fool(pictures.rebuilt, told)
            loss = loss + self.game.adversarial * weight * fooling
        backward(loss, precision.scaler)
        descent = descend(loss, self.tokenizer, self.optimizers["optimizer"], scaler=precision.scaler)
        self.put_back(book, descent.skipped)
        values: dict[str, float | Tensor] = {
            "reconstruction": F.mse_loss(pictures.rebuilt.detach(), images),
            "codes_used": count_used(result.codes, self.tokenizer.config.num_codes),
            "perceptual": pictures.perceptual,
            "fooling": fooling,
            "discriminator": torch.zeros_like(loss),
            "adaptive_weight": weight,
        }
        if plays:
            other = self._tell_apart(images, pictures.rebuilt.detach())
            values["discriminator"] = other.loss
            descent = Descent(descent.loss, descent.gradient_norm, descent.skipped | other.skipped)
        return StepResult(values, descent)

    def _compare(self, rebuilt: Tensor, images: Tensor) -> _Pictures:
        distance = torch.zeros((), dtype=torch.float32, device=self.device)
        if self.perceptual is not None:
            # In float32 always: 16 bits round away the small differences that it measures.
            distance = self.perceptual(rebuilt, images).mean()
        return _Pictures(rebuilt, F.l1_loss(rebuilt, images), distance)

    def _fool(self, rebuilt: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """How little the discriminator is fooled, and the weight that lets it pull as ``told`` does."""
        self.discriminator.requires_grad_(False)
        precision = self.precisions["optimizer"]
        with precision.autocast():
            fooling = fooling_loss(self.discriminator(rebuilt))
        self.discriminator.requires_grad_(True)
        scale = precision.loss_scale()
        scale = torch.ones_like(told) if scale is None else scale
        pulls = [
            torch.autograd.grad(loss * scale, self.tokenizer.last_layer, retain_graph=True)[0].norm() / scale
            for loss in (told, fooling)
        ]
        return fooling, (pulls[0] / (pulls[1] + EPS)).clamp(0, MOST).detach()

    def _tell_apart(self, images: Tensor, rebuilt: Tensor) -> Descent:
        """The discriminator's part of a step."""
        precision = self.precisions["discriminator_optimizer"]
        with precision.autocast():
            loss = hinge_loss(self.discriminator(images), self.discriminator(rebuilt))
        backward(loss, precision.scaler)
        optimizer = self.optimizers["discriminator_optimizer"]
        return descend(loss, self.discriminator, optimizer, scaler=precision.scaler)

    def shown(self, values: Mapping[str, float]) -> str:
        seen = f"perceptual {values['perceptual']:.4f}, discriminator {values['discriminator']:.3f}"
        return f"{super().shown(values)}, {seen}"
