# SPDX-License-Identifier: Apache-2.0
"""Training of CLIP-GEN, which learns to draw from pictures alone: no caption is read.

The image tokenizer gives each picture's codes and CLIP its embedding, once for the whole training. The loss
is the cross-entropy of the codes behind the embedding. Optionally there is a second one: the likeliest codes
are decoded, and the picture's embedding is compared with that of the input. Gradients pass the choice of
codes as they pass a softmax (straight-through).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.config import ClipGenTrainConfig, ModelConfig, SamplingConfig, TrainConfig
from cogview.data.fingerprint import fingerprint
from cogview.data.order import batch_indices
from cogview.data.pairs import Pairs, open_pictures
from cogview.device import default_device
from cogview.files import StrPath, digest
from cogview.model.clip_gen import ClipGen, clip_gen_config
from cogview.perception.clip import TOGETHER, Clip, fingerprint_clip, load_clip
from cogview.progress import Progress
from cogview.seeding import derive_seed
from cogview.settings import check_settings, write_settings
from cogview.tokens.tokenizers import IMAGE_TOKENIZER, load_image_tokenizer
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.checkpoint import check_resumable, latest_checkpoint
from cogview.training.lock import RunLock
from cogview.training.loop import History, StepResult, Trainer, backward, descend, run_loop, set_learning_rate
from cogview.training.optim import learning_rate, parameter_groups
from cogview.training.precision import Precision
from cogview_kernels import ThreeRegionLayout, linear_cross_entropy

SETTINGS = "clip-gen.json"
CHECKPOINTS = "clip-gen-checkpoints"
CLIP_NORM = 1.0


class EncodedPictures(NamedTuple):
    """What is trained on."""

    codes: Tensor  # int64 [M, N]
    embeddings: Tensor  # [M, E], of length 1


class Judges(NamedTuple):
    """The frozen networks: what draws codes, and what compares pictures."""

    tokenizer: ImageTokenizer
    clip: Clip


@torch.no_grad()
def encode_pictures(judges: Judges, pairs: Pairs, *, progress: bool = True) -> EncodedPictures:
    """Codes and embeddings of all pictures; their captions are not asked for."""
    config, mean = judges.tokenizer.config, judges.tokenizer.mean
    codes, embeddings = [], []
    with Progress(len(pairs), "encode pictures", unit="image", enabled=progress) as bar:
        for start in range(0, len(pairs), TOGETHER):
            part = range(start, min(start + TOGETHER, len(pairs)))
            images = torch.stack([pairs.image(index, config.image_size) for index in part]).to(mean)
            codes.append(judges.tokenizer.encode(images).flatten(1))
            embeddings.append(judges.clip.of_images(images))
            bar.update(len(part))
    return EncodedPictures(torch.cat(codes), torch.cat(embeddings))


def noisy(embeddings: Tensor, noise: float) -> Tensor:
    """Embeddings moved by ``noise`` in a random direction, and of length 1 again.

    A text's embedding lies beside those of its pictures; so moved, they surround it (Zhou et al., LAFITE,
    arXiv:2111.13792).
    """
    direction = F.normalize(torch.randn_like(embeddings), dim=1)
    return F.normalize(embeddings + noise * direction, dim=1)


class ClipGenTrainer(Trainer):
    """Cross-entropy of the codes, and the distance between embeddings if it has a weight; AdamW.

    Raises:
        ValueError: the device cannot compute in ``config.precision``.
    """

    label = "train CLIP-GEN"
    board = "clip_gen"
    checkpoints = CHECKPOINTS
    recorded = ("code_loss", "embedding_loss", "learning_rate")

    def __init__(
        self, model: ClipGen, pictures: EncodedPictures, judges: Judges, config: ClipGenTrainConfig
    ) -> None:
        self.model: ClipGen = model
        self.pictures, self.judges, self.config = pictures, judges, config
        self.device = model.condition.weight.device
        self.precision = Precision(config.precision, self.device)
        groups = parameter_groups(model, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
        self.optimizers = {"optimizer": self.optimizer}
        self._schedule = TrainConfig(
            steps=config.steps, learning_rate=config.learning_rate, warmup_fraction=config.warmup_fraction
        )
        self._layouts = torch.Generator(device=self.device)

    def batches(self, first: int) -> Iterator[list[int]]:
        for step in range(first, self.config.steps):
            yield batch_indices(self.config.seed, step, self.config.batch_size, len(self.pictures.codes))

    def step(self, step: int, batch: list[int]) -> StepResult:
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "clip-gen", step))
        self._layouts.manual_seed(derive_seed(config.seed, "layouts", step))
        rate = learning_rate(step, self._schedule)
        set_learning_rate(self.optimizer, rate)
        chosen = torch.tensor(batch, device=self.pictures.codes.device)
        codes, embeddings = self.pictures.codes[chosen], self.pictures.embeddings[chosen]
        given = noisy(embeddings, config.embedding_noise) if config.embedding_noise else embeddings
        with self.precision.autocast():
            hidden = self.model(given, codes[:, :-1], layout=self._draw_layouts(len(codes)))
            weight = self.model.transformer.word_embeddings.weight
            code_loss = linear_cross_entropy(hidden.flatten(0, 1), weight, codes.flatten())
        assert isinstance(code_loss, Tensor)
        loss, distance = code_loss, torch.zeros_like(code_loss)
        if config.embedding_loss:
            distance = self._embedding_loss(hidden, embeddings)
            loss = loss + config.embedding_loss * distance
        backward(loss, self.precision.scaler)
        descent = descend(loss, self.model, self.optimizer, clip_norm=CLIP_NORM, scaler=self.precision.scaler)
        values: dict[str, float | Tensor] = {
            "code_loss": code_loss,
            "embedding_loss": distance,
            "learning_rate": rate,
        }
        return StepResult(values, descent)

    def _draw_layouts(self, rows: int) -> list[ThreeRegionLayout] | None:
        """Three-region layouts, drawn anew; the embedding's place is the text of every row."""
        config = self.model.config
        if config.three_region is None:
            return None
        is_text = torch.arange(config.max_positions, device=self.device).expand(rows, -1) == 0
        return [
            ThreeRegionLayout.sample(
                is_text,
                min(config.three_region.num_pivots, config.max_positions),
                block_size=config.three_region.block_size,
                window_blocks=config.three_region.window_blocks,
                density_correction=config.three_region.density_correction,
                generator=self._layouts,
            )
            for _ in range(config.num_layers)
        ]

    def _embedding_loss(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """1 - cosine between the embeddings of the input and of the likeliest codes' picture."""
        tokenizer, clip = self.judges
        grid = tokenizer.config.grid
        logits = (hidden @ self.model.transformer.word_embeddings.weight.t()).float()
        soft = logits.softmax(-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
        chosen = hard + soft - soft.detach()
        vectors = chosen @ tokenizer.quantizer.embed.t()
        images = tokenizer.rebuild(vectors.view(len(vectors), grid, grid, -1)).clamp(0, 1)
        return (1 - (clip.of_images(images) * embeddings).sum(1)).mean()

    def shown(self, values: Mapping[str, float]) -> str:
        text = f"codes {values['code_loss']:.3f}"
        return f"{text}, embedding {values['embedding_loss']:.3f}" if self.config.embedding_loss else text

    def state(self) -> dict[str, Any]:
        return self.precision.state()

    def load_state(self, state: Mapping[str, Any], source: Path) -> None:
        self.precision.load_state(state, source)


@dataclass(frozen=True)
class TrainClipGen:
    """Train CLIP-GEN on the pictures of ``data``, in the run folder ``out`` with an image tokenizer."""

    data: StrPath
    out: StrPath
    clip: StrPath
    model: ModelConfig  # vocabulary and positions follow from the tokenizer
    train: ClipGenTrainConfig = field(default_factory=ClipGenTrainConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    device: str = field(default_factory=default_device)
    progress: bool = True

    def __post_init__(self) -> None:
        if self.sampling.guidance != 1:
            raise ValueError(f"sampling.guidance must be 1 for CLIP-GEN, got {self.sampling.guidance}")


@dataclass(frozen=True)
class ClipGenSettings:
    """What a CLIP-GEN was trained with, ``clip-gen.json`` in its run folder."""

    data: str
    clip: str
    embedding_width: int
    model: ModelConfig
    train: ClipGenTrainConfig
    sampling: SamplingConfig


def train_clip_gen(options: TrainClipGen, pairs: Pairs | None = None) -> History:
    """Train, or go on from the latest checkpoint; returns both losses and the learning rate per step.

    ``pairs``: in place of those that ``options.data`` names; their captions are not asked for.

    Raises:
        ValueError: the folder was started with other settings, data, tokenizer or CLIP.
        FileNotFoundError: no such data, no image tokenizer in the folder, or no CLIP.
        BlockingIOError: another training is at work in the folder.
    """
    with RunLock(options.out) as lock:
        out = Path(options.out)
        tokenizer = load_image_tokenizer(out, options.device)
        tokenizer.requires_grad_(False)
        judges = Judges(tokenizer, load_clip(options.clip, options.device))
        pairs = open_pictures(options.data) if pairs is None else pairs
        config = clip_gen_config(options.model, tokenizer.config)
        settings = ClipGenSettings(
            str(options.data),
            str(options.clip),
            judges.clip.width,
            config,
            options.train,
            options.sampling,
        )
        origin = {
            "clip": fingerprint_clip(options.clip),
            "data": fingerprint(pairs),
            "tokenizers": digest(out / IMAGE_TOKENIZER),
        }
        saved = latest_checkpoint(out / CHECKPOINTS)
        if saved is not None:
            check_settings(out / SETTINGS, settings)
            check_resumable(saved, origin)
        pairs.check(tokenizer.config.image_size, progress=options.progress)
        pictures = encode_pictures(judges, pairs, progress=options.progress)
        lock.take()
        write_settings(out / SETTINGS, settings)
        torch.manual_seed(derive_seed(options.train.seed, "init clip-gen"))
        model = ClipGen(config, judges.clip.width).to(options.device)
        trainer = ClipGenTrainer(model, pictures, judges, options.train)
        trainer.origin = origin
        return run_loop(trainer, options.train, out, progress=options.progress)
