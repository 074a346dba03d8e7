# SPDX-License-Identifier: Apache-2.0
"""Training of the VQ-VAE image tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import ImageTokenizerTrainConfig
from cogview.data.loading import training_images
from cogview.data.order import StepBatches
from cogview.data.pairs import Pairs
from cogview.seeding import derive_seed
from cogview.tokens.vqvae import ImageTokenizer, count_used, stretched_hues
from cogview.training.loop import StepResult, Trainer, backward, descend, set_learning_rate
from cogview.training.optim import cosine_to_zero
from cogview.training.precision import Precision
from cogview.training.speed import peak_memory_gb

LAST_TEMPERATURE = 1 / 16  # of the codebook method "gumbel", reached at half of the training, as by DALL-E


def temperature(done: float) -> float:
    """The temperature after a share ``done`` of the steps: from 1, geometrically, to its last value."""
    return LAST_TEMPERATURE ** min(1.0, 2 * done)


class ImageTokenizerTrainer(Trainer):
    """Pixel MSE plus commitment, Adam, a cosine to zero; the codebook as :class:`Quantizer` says.

    Raises:
        ValueError: the device cannot compute in the precision.
    """

    label = "train image tokenizer"
    board = "image_tokenizer"
    checkpoints = "tokenizer-checkpoints"
    recorded: tuple[str, ...] = ("reconstruction", "codes_used")
    betas = (0.9, 0.999)  # of Adam

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
        self.optimizers = {"optimizer": self.adam(learned)}
        self.precisions = {"optimizer": Precision(config.precision, self.device)}
        self._hues = stretched_hues().to(self.device)
        self._schedule = cosine_to_zero(config.steps)

    def adam(self, learned: Sequence[nn.Parameter]) -> torch.optim.Adam:
        """The optimizer of one of the trained networks."""
        return torch.optim.Adam(learned, lr=self.config.learning_rate, betas=self.betas, fused=True)

    def batches(self, first: int) -> Iterator[Tensor]:
        config = self.config
        order = StepBatches(config.seed, config.batch_size, len(self.pairs), range(first, config.steps))
        return training_images(self.pairs, self.tokenizer.config.image_size, order, self.workers)

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
        precision = self.precisions["optimizer"]
        with precision.autocast():
            result = self.tokenizer(images, quantise=step >= self.config.warmup_steps)
        rebuilt = result.images.float()
        reconstruction = F.mse_loss(rebuilt, images)
        loss = reconstruction + self.config.commitment * result.commitment + result.codebook
        if self.config.color_weight:
            loss = loss + self.config.color_weight * self.color_error(rebuilt, images)
        backward(loss, precision.scaler)
        descent = descend(loss, self.model, self.optimizers["optimizer"], scaler=precision.scaler)
        self.put_back(book, descent.skipped)
        codes_used = count_used(result.codes, self.tokenizer.config.num_codes)
        return StepResult({"reconstruction": reconstruction, "codes_used": codes_used}, descent)

    def color_error(self, rebuilt: Tensor, images: Tensor) -> Tensor:
        """Mean square of the error of each code's mean colour, as ``stretched_hues`` see it.

        Outlines make up most of the pixels' error; this tells one plain colour from another.
        """
        means = F.avg_pool2d(rebuilt - images, 2**self.tokenizer.config.stages)
        return torch.einsum("ij,bjhw->bihw", self._hues, means).square().mean()

    def state(self) -> dict[str, Any]:
        return {name: precision.state() for name, precision in self.precisions.items()}

    def load_state(self, state: Mapping[str, Any], source: Path) -> None:
        for name, precision in self.precisions.items():
            precision.load_state(state.get(name, {}), source)

    def speed(self, seconds: float) -> dict[str, float]:
        images = self.config.batch_size / seconds
        return {"images_per_second": images, "peak_memory_gb": peak_memory_gb(self.device)}

    def shown(self, values: Mapping[str, float]) -> str:
        return f"mse {values['reconstruction']:.5f}, codes {values['codes_used']:.0f}"
