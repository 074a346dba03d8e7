# SPDX-License-Identifier: Apache-2.0
"""Training of the transformer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from cogview.config import ModelConfig, TrainConfig
from cogview.data.loading import training_batches
from cogview.data.tokens import TokenDataset
from cogview.files import StrPath
from cogview.model.transformer import CogView
from cogview.seeding import derive_seed
from cogview.tokens.sequence import Batch, drop_codes
from cogview.training import distributed
from cogview.training.checkpoint import CHECKPOINTS
from cogview.training.compilation import compiled_layers, uncompiled
from cogview.training.flops import step_flops
from cogview.training.loop import (
    History,
    StepResult,
    Trainer,
    backward,
    descend,
    run_loop,
    set_learning_rate,
)
from cogview.training.optim import learning_rate, make_optimizer, shrunk_gradient
from cogview.training.precision import NonFiniteWatch, Precision
from cogview.training.resblock import ResblockScaling
from cogview.training.speed import peak_flops, peak_memory_gb
from cogview_kernels import ThreeRegionLayout, linear_cross_entropy

VALIDATION_IMAGES = 1024  # at most, for each checkpoint


def sample_layouts(
    config: ModelConfig, batch: Batch, generator: torch.Generator
) -> list[ThreeRegionLayout] | None:
    """One three-region layout per layer, drawn anew; None if the model trains with dense attention.

    Padding takes pivots as text does (only padding sees it), so every row has the same number of image
    pivots. The released code gives rows of less text more of them; in image-to-text order the model then
    reads the length of the coming text off their number, and is lost without it when it captions.
    """
    if config.three_region is None or batch.grid is not None:
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


def split_layouts(
    layouts: list[ThreeRegionLayout] | None, parts: int
) -> list[list[ThreeRegionLayout] | None]:
    """The layouts of the rows of :meth:`Batch.split`."""
    if layouts is None:
        return [None] * parts
    pivots = [layout.pivots.tensor_split(parts) for layout in layouts]
    return [
        [dataclasses.replace(layout, pivots=rows[part]) for layout, rows in zip(layouts, pivots, strict=True)]
        for part in range(parts)
    ]


def losses_of(
    model: CogView,
    batch: Batch,
    layouts: list[ThreeRegionLayout] | None,
    whole: Batch | None = None,
    wide_head: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean loss to train on, and the plain means after image codes and after other tokens.

    One pass over the logits gives all three. Nats per token. The means are those of ``whole``, of which
    ``batch`` is a part: the sums over the parts are divided by what counts in ``whole``, so the losses of
    the parts, and their gradients, add up to those of ``whole``. ``wide_head`` keeps the logits and their
    gradient in float32 under autocast.
    """
    whole = batch if whole is None else whole
    hidden = model(batch.tokens, positions=batch.positions, layout=batch.grid or layouts)
    with torch.autocast(hidden.device.type, enabled=False) if wide_head else nullcontext():
        loss, token_losses = linear_cross_entropy(
            hidden,
            model.word_embeddings.weight,
            batch.targets,
            token_weight=batch.weight / whole.weight.sum(),
            reduction="sum",
            return_losses=True,
        )
    (after_image, after_text), counted = _kinds(batch), _kinds(whole)
    image_loss = (token_losses * after_image).sum() / counted[0].sum().clamp(min=1)
    text_loss = (token_losses * after_text).sum() / counted[1].sum().clamp(min=1)
    return loss, image_loss, text_loss


def _kinds(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which tokens count that come after an image code, and which that come after another token."""
    has_target = batch.weight > 0
    return has_target & ~batch.text_mask, has_target & batch.text_mask


@dataclass(frozen=True)
class TrainingData:
    """What to train on and what to validate on."""

    training: TokenDataset
    validation: TokenDataset | None = None
    workers: int = 0  # processes that make batches ahead; 0 makes them between the steps


class TransformerTrainer(Trainer):
    """Rows of both orders, layouts drawn anew in every step, AdamW under a warm-up and a cosine.

    With several ranks, ``model`` is sharded over them.

    Raises:
        ValueError: the device cannot compute in ``config.precision``; more ranks, or parts on each of them,
            than the batch has rows.
    """

    label = "train"
    board = "train"
    checkpoints = CHECKPOINTS
    recorded = ("image_loss", "text_loss", "learning_rate")

    def __init__(self, model: CogView, data: TrainingData | TokenDataset, config: TrainConfig) -> None:
        self.model: CogView = model
        self.data = TrainingData(data) if isinstance(data, TokenDataset) else data
        self.config = config
        self.device = model.word_embeddings.weight.device
        self.precision = Precision(config.precision, self.device, loss_scaling=not config.resblock_scaling)
        if config.resblock_scaling and distributed.num_ranks() > 1:
            raise ValueError("resblock_scaling is for one process; leave it out, or start without torchrun")
        distributed.require_rows(config.batch_size, config.accumulate)
        distributed.shard_model(model, model.sharding_units(), self.precision.dtype)
        self.optimizer = make_optimizer(model, config)
        self.optimizers = {"optimizer": self.optimizer}
        self.log_every = config.log_every
        self.resblocks = ResblockScaling(model) if config.resblock_scaling else None
        self.draw: Callable[[], Any] | None = None
        self._tokens = config.batch_size * self.data.training.input_tokens
        flops = step_flops(model.config, config.batch_size, self.data.training.input_tokens)
        # Nobody has counted the pairs of query and key that local attention sees.
        self._flops = 0.0 if self.data.training.has_grids else flops.model
        self._peak_flops = peak_flops(self.device, self.precision.dtype)
        self._layout_generator = torch.Generator(device=self.device)

    def batches(self, first: int) -> Iterator[Batch]:
        config = self.config
        batch = self._batches_of(self.data.training, config.batch_size, config.text_dropout)
        batches = training_batches(batch, range(first, config.steps), self.data.workers)
        if not config.code_dropout:
            return batches
        hide = partial(drop_codes, self.data.training.vocab)
        return (
            hide(batch, config.code_dropout, derive_seed(config.seed, "code dropout", step))
            for step, batch in enumerate(batches, first)
        )

    def _batches_of(
        self, dataset: TokenDataset, batch_size: int, text_dropout: float = 0.0
    ) -> Callable[[int], Batch]:
        return partial(
            dataset.batch,
            batch_size=batch_size,
            text_weight=self.config.text_weight,
            caption_fraction=self.config.caption_fraction,
            seed=self.config.seed,
            text_dropout=text_dropout,
        )

    def step(self, step: int, batch: Batch) -> StepResult:
        rate = learning_rate(step, self.config)
        set_learning_rate(self.optimizer, rate)
        scaler, scale = self.precision.scaler, self.precision.loss_scale()
        loss, image_loss, text_loss = self._gradient(step, batch, scaler)
        board_only: dict[str, float | Tensor] = {} if scale is None else {"loss_scale": scale}
        if self.resblocks is not None:
            board_only["smallest_block_scale"] = self.resblocks.scales.min()
            board_only["dropped_blocks"] = self.resblocks.unscale()
        descent = descend(loss, self.model, self.optimizer, clip_norm=self.config.clip_norm, scaler=scaler)
        return StepResult(
            {"image_loss": image_loss, "text_loss": text_loss, "learning_rate": rate}, descent, board_only
        )

    def _gradient(
        self,
        step: int,
        batch: Batch,
        scaler: torch.amp.GradScaler | None,
        watch: NonFiniteWatch | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of a step; leaves their gradient, times the loss scale, at the parameters.

        A batch in parts, on one rank or on several, has the layouts, the losses and the gradient of the whole
        batch, to rounding. Its dropout masks are others, and ``pb_relax="tensor"`` is over the rows of a
        part. Ranks add their gradients up after each part: to wait for the last one, every rank would have to
        hold the gradient of all weights, and parts are there to save memory.
        """
        rank, ranks, parts = distributed.rank(), distributed.num_ranks(), self.config.accumulate
        torch.manual_seed(derive_seed(self.config.seed, "dropout", step, *([rank] if rank else [])))
        self._layout_generator.manual_seed(derive_seed(self.config.seed, "layouts", step))
        batch = batch.to(self.device)
        layouts = sample_layouts(self.model.config, batch, self._layout_generator)
        own, own_layouts = batch.split(ranks)[rank], split_layouts(layouts, ranks)[rank]
        losses = []
        # Activation checkpointing runs the layers again in the backward pass, so that belongs inside as well.
        with nullcontext() if self.resblocks is None else self.resblocks.scaled():
            for part, its_layouts in zip(own.split(parts), split_layouts(own_layouts, parts), strict=True):
                shrunk = shrunk_gradient(self.model.word_embeddings, self.config.embedding_gradient)
                with shrunk, self.precision.autocast():
                    wide_head = self.resblocks is not None
                    loss, image_loss, text_loss = losses_of(self.model, part, its_layouts, batch, wide_head)
                if watch is not None:
                    watch.look("the loss", loss)
                backward(loss, scaler)
                losses.append((loss.detach(), image_loss, text_loss))
        sums = torch.stack([torch.stack(values).sum(0) for values in zip(*losses, strict=True)])
        loss, image_loss, text_loss = distributed.sum_over_ranks(sums).unbind()
        return loss, image_loss, text_loss

    def speed(self, seconds: float) -> dict[str, float]:
        rates = {"tokens_per_second": self._tokens / seconds}
        if self._flops:
            rates["teraflops_per_second"] = self._flops / seconds / 1e12
        if self._flops and self._peak_flops:
            all_devices = self._peak_flops * distributed.num_ranks()
            rates["model_flops_utilisation"] = self._flops / seconds / all_devices
        return {**rates, "peak_memory_gb": peak_memory_gb(self.device)}

    def sample(self) -> Any:
        assert self.draw is not None
        self.model.eval()
        try:
            with uncompiled():  # drawing has other shapes at every token
                return self.draw()
        finally:
            self.model.train()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The losses of the same images, texts and layouts each time, without dropout."""
        dataset = self.data.validation
        if dataset is None:
            return {}
        images = min(len(dataset), VALIDATION_IMAGES)
        count = -(-images // -(-self.config.batch_size // self.config.accumulate))
        batch_size = images // count
        parts = distributed.num_ranks() if batch_size >= distributed.num_ranks() else 1
        part = distributed.rank() % parts
        self._layout_generator.manual_seed(derive_seed(self.config.seed, "validation layouts"))
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float32, device=self.device)
        all_counts = torch.zeros_like(sums)
        for batch in map(self._batches_of(dataset, batch_size), range(count)):
            batch = batch.to(self.device)
            layouts = split_layouts(sample_layouts(self.model.config, batch, self._layout_generator), parts)
            with self.precision.autocast():
                own, wide_head = batch.split(parts)[part], self.resblocks is not None
                _, *means = losses_of(self.model, own, layouts[part], batch, wide_head)
            counts = torch.stack([kind.sum() for kind in _kinds(batch)]).float()
            sums += torch.stack(means).float() * counts
            all_counts += counts
        self.model.train()
        sums = distributed.sum_over_ranks(sums) if parts > 1 else sums
        image_loss, text_loss = (sums / all_counts.clamp(min=1)).tolist()
        return {"image_loss": image_loss, "text_loss": text_loss}

    def shown(self, values: Mapping[str, float]) -> str:
        return f"image {values['image_loss']:.3f}, text {values['text_loss']:.3f}"

    def explain(self, step: int, batch: Batch, values: Mapping[str, float]) -> str:
        """Runs the step once more, at the loss scale that it had."""
        scaler = None
        if self.precision.scaler is not None:
            scaler = torch.amp.GradScaler(self.device.type, init_scale=values["loss_scale"])
        with uncompiled(), NonFiniteWatch(self.model) as watch:
            self._gradient(step, batch, scaler, watch)
        where = next((where for where in distributed.of_all_ranks(watch.where) if where), "")
        for name, parameter in self.model.named_parameters():
            # The watch sees no gradient of a weight that is sharded.
            if not where and parameter.grad is not None:
                finite = distributed.own_part(parameter.grad).isfinite().all()
                where = f"the gradient of {name}" if distributed.any_rank(not finite) else ""
        self.optimizer.zero_grad(set_to_none=True)
        return where

    def state(self) -> dict[str, Any]:
        return self.precision.state() if self.resblocks is None else self.resblocks.state()

    def load_state(self, state: Mapping[str, Any], source: Path) -> None:
        (self.precision if self.resblocks is None else self.resblocks).load_state(state, source)


def train(
    model: CogView,
    data: TrainingData | TokenDataset,
    config: TrainConfig,
    out: StrPath,
    *,
    origin: Mapping[str, str] = MappingProxyType({}),
    draw: Callable[[], Any] | None = None,
    progress: bool = True,
) -> History:
    """Train ``model`` in place, resuming from the latest checkpoint under ``out`` if there is one.

    A step whose loss or gradient is not finite changes nothing; it is run once more to name the module where
    that began. Precision: see :mod:`cogview.training.precision`. Seeds PyTorch's global generators.
    Returns the history: ``image_loss``, ``text_loss``, ``learning_rate``, one value per step. The rest is
    :func:`cogview.training.loop.run_loop`.
    In an initialised process group (``torch.distributed``), all ranks train together: see
    :mod:`cogview.training.distributed`. Every rank gives the same model, data and settings; the model is
    sharded afterwards.

    Args:
        data: a dataset alone is trained on without validation.
        origin: fingerprints of what is trained on, by name; checkpoints keep them.
        draw: makes the PIL picture that TensorBoard shows every ``config.samples_every`` steps.
    """
    trainer = TransformerTrainer(model, data, config)
    trainer.origin = origin
    if draw is not None:
        trainer.draw, trainer.samples_every = draw, config.samples_every
    with compiled_layers(model) if config.compile_layers else nullcontext():
        return run_loop(trainer, config, out, progress=progress)
