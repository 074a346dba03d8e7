# SPDX-License-Identifier: Apache-2.0
"""Training of the VQ-VAE image tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.config import ImageTokenizerTrainConfig
from cogview.data.loading import training_images
from cogview.data.order import StepBatches
from cogview.data.pairs import Pairs
from cogview.files import StrPath
from cogview.seeding import derive_seed
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.loop import History, StepResult, Trainer, backward, descend, run_loop, set_learning_rate
from cogview.training.speed import peak_memory_gb


class ImageTokenizerTrainer(Trainer):
    """Pixel MSE plus commitment, Adam, a cosine to zero; the codebook follows by moving averages."""

    label = "train image tokenizer"
    board = "image_tokenizer"
    checkpoints = "tokenizer-checkpoints"
    recorded = ("reconstruction", "codes_used")

    def __init__(
        self, tokenizer: ImageTokenizer, pairs: Pairs, config: ImageTokenizerTrainConfig, workers: int = 0
    ) -> None:
        self.model: ImageTokenizer = tokenizer
        self.pairs = pairs
        self.config = config
        self.workers = workers
        self.device = next(tokenizer.parameters()).device
        self.optimizer = torch.optim.Adam(tokenizer.parameters(), lr=config.learning_rate, fused=True)
        self.optimizers = {"optimizer": self.optimizer}
        angle = torch.linspace(0, torch.pi, config.steps + 1, dtype=torch.float32)
        self._schedule = 0.5 * (1 + torch.cos(angle))

    def batches(self, first: int) -> Iterator[Tensor]:
        config = self.config
        order = StepBatches(config.seed, config.batch_size, len(self.pairs), range(first, config.steps))
        return iter(training_images(self.pairs, self.model.config.image_size, order, self.workers))

    def step(self, step: int, batch: Tensor) -> StepResult:
        torch.manual_seed(derive_seed(self.config.seed, "image tokenizer", step))
        images = batch.to(self.device)
        set_learning_rate(self.optimizer, self.config.learning_rate * float(self._schedule[step]))
        book = {name: buffer.clone() for name, buffer in self.model.quantize_t.named_buffers()}
        result = self.model(images)
        reconstruction = F.mse_loss(result.images, images)
        loss = reconstruction + self.config.commitment * result.commitment
        backward(loss)
        descent = descend(loss, self.model, self.optimizer)
        # The forward pass has already moved the codebook: after a skipped step it is put back.
        for name, buffer in self.model.quantize_t.named_buffers():
            buffer.copy_(torch.where(descent.skipped, book[name], buffer))
        codes_used = float(len(result.codes.unique()))
        return StepResult({"reconstruction": reconstruction, "codes_used": codes_used}, descent)

    def speed(self, seconds: float) -> dict[str, float]:
        images = self.config.batch_size / seconds
        return {"images_per_second": images, "peak_memory_gb": peak_memory_gb(self.device)}

    def shown(self, values: Mapping[str, float]) -> str:
        return f"mse {values['reconstruction']:.5f}, codes {values['codes_used']:.0f}"


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

    Loss: pixel MSE (in [0, 1]) plus ``commitment`` times the commitment term; Adam, cosine to zero. A step
    whose loss or gradient is not finite changes nothing. ``workers`` processes read images ahead; 0 reads
    them between the steps. Checkpoints keep ``origin``, fingerprints of what is trained on. Seeds PyTorch's
    global generators. Returns the history: ``reconstruction``
    (MSE) and ``codes_used`` (distinct codes in the batch) per step. The rest is
    :func:`cogview.training.loop.run_loop`.
    """
    trainer = ImageTokenizerTrainer(tokenizer, pairs, config, workers)
    trainer.origin = origin
    return run_loop(trainer, config, out, progress=progress)
