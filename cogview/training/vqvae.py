# SPDX-License-Identifier: Apache-2.0
"""Training of the VQ-VAE image tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import ImageTokenizerConfig, ImageTokenizerTrainConfig
from cogview.data.loading import training_images
from cogview.data.order import StepBatches
from cogview.data.pairs import Pairs
from cogview.files import StrPath
from cogview.seeding import derive_seed
from cogview.tokens.vqgan import make_image_tokenizer
from cogview.tokens.vqvae import ImageTokenizer, stretched_hues
from cogview.training.loop import History, StepResult, Trainer, backward, descend, run_loop, set_learning_rate
from cogview.training.speed import peak_memory_gb

LAST_TEMPERATURE = 1 / 16  # of the codebook method "gumbel", reached at half of the training, as by DALL-E


def temperature(done: float) -> float:
    """The temperature after a share ``done`` of the steps: from 1, geometrically, to its last value."""
    return LAST_TEMPERATURE ** min(1.0, 2 * done)


class ImageTokenizerTrainer(Trainer):
    """Pixel MSE plus commitment, Adam, a cosine to zero; the codebook as :class:`Quantizer` says."""

    label = "train image tokenizer"
    board = "image_tokenizer"
    checkpoints = "tokenizer-checkpoints"
    recorded: tuple[str, ...] = ("reconstruction", "codes_used")

    def __init__(
        self, tokenizer: ImageTokenizer, pairs: Pairs, config: ImageTokenizerTrainConfig, workers: int = 0
    ) -> None:
        self.model: nn.Module = tokenizer
        self.tokenizer = tokenizer
        self.pairs = pairs
        self.config = config
        self.workers = workers
        self.device = next(tokenizer.parameters()).device
        tokenizer.quantizer.learn_by(config.codebook)
        learned = [parameter for parameter in tokenizer.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(learned, lr=config.learning_rate, fused=True)
        self.optimizers = {"optimizer": self.optimizer}
        self._apart = stretched_hues().to(self.device)
        angle = torch.linspace(0, torch.pi, config.steps + 1, dtype=torch.float32)
        self._schedule = 0.5 * (1 + torch.cos(angle))

    def batches(self, first: int) -> Iterator[Tensor]:
        config = self.config
        order = StepBatches(config.seed, config.batch_size, len(self.pairs), range(first, config.steps))
        return iter(training_images(self.pairs, self.tokenizer.config.image_size, order, self.workers))

    def prepare(self, step: int, images: Tensor) -> dict[str, Tensor]:
        """Seed, rate and temperature of a step, and the book as it is before."""
        torch.manual_seed(derive_seed(self.config.seed, "image tokenizer", step))
        for optimizer in self.optimizers.values():
            set_learning_rate(optimizer, self.config.learning_rate * float(self._schedule[step]))
        quantizer = self.tokenizer.quantizer
        quantizer.temperature = temperature(step / self.config.steps)
        if 0 < step == self.config.warmup_steps:
            with torch.no_grad():
                quantizer.begin_at(self.tokenizer.vectors(images))
        return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}

    def put_back(self, book: Mapping[str, Tensor], skipped: Tensor) -> None:
        """After a skipped step: the forward pass has already moved the codebook."""
        for name, tensor in self.tokenizer.quantizer.state_dict().items():
            tensor.copy_(torch.where(skipped, book[name], tensor))

    def step(self, step: int, batch: Tensor) -> StepResult:
        images = batch.to(self.device)
        book = self.prepare(step, images)
        result = self.tokenizer(images, quantise=step >= self.config.warmup_steps)
        reconstruction = F.mse_loss(result.images, images)
        loss = reconstruction + self.config.commitment * result.commitment + result.codebook
        if self.config.color_weight:
            # Outlines make up most of the pixels' error; this tells one plain colour from another.
            means = F.avg_pool2d(result.images - images, 2**self.tokenizer.config.stages)
            apart = torch.einsum("ij,bjhw->bihw", self._apart, means)
            loss = loss + self.config.color_weight * apart.square().mean()
        backward(loss)
        descent = descend(loss, self.model, self.optimizer)
        self.put_back(book, descent.skipped)
        codes_used = float(len(result.codes.unique()))
        return StepResult({"reconstruction": reconstruction, "codes_used": codes_used}, descent)

    def speed(self, seconds: float) -> dict[str, float]:
        images = self.config.batch_size / seconds
        return {"images_per_second": images, "peak_memory_gb": peak_memory_gb(self.device)}

    def shown(self, values: Mapping[str, float]) -> str:
        return f"mse {values['reconstruction']:.5f}, codes {values['codes_used']:.0f}"


def new_image_tokenizer(shape: ImageTokenizerConfig, config: ImageTokenizerTrainConfig) -> ImageTokenizer:
    """A tokenizer that is ready to be trained; it follows from PyTorch's global generator."""
    tokenizer = make_image_tokenizer(shape)
    if shape.patches:
        tokenizer.begin_with_patches(config.color_weight)
    return tokenizer


def train_image_tokenizer(
    tokenizer: ImageTokenizer,
    pairs: Pairs,
    config: ImageTokenizerTrainConfig,
    out: StrPath,
    *,
    origin: Mapping[str, str] = MappingProxyType({}),
    progress: bool = True,
    workers: int = 0,
) -> History:
    """Train ``tokenizer`` in place on the images of ``pairs``, resuming from ``out/tokenizer-checkpoints``.

    Loss: pixel MSE (in [0, 1]) plus ``commitment`` times the commitment term, ``color_weight`` times the MSE
    of the cells' mean colours under ``stretched_hues`` and, where ``codebook`` is "straight-through", the
    codebook's own; Adam, cosine to zero.
    A step whose loss or gradient is not finite changes nothing. ``workers`` processes read images ahead; 0
    reads them between the steps. Checkpoints keep ``origin``, fingerprints of what is trained on. Seeds
    PyTorch's global generators. Returns the history: ``reconstruction`` (MSE) and ``codes_used`` (distinct
    codes in the batch) per step. The rest is :func:`cogview.training.loop.run_loop`.
    """
    trainer = ImageTokenizerTrainer(tokenizer, pairs, config, workers)
    trainer.origin = origin
    return run_loop(trainer, config, out, progress=progress)
