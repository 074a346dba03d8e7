# SPDX-License-Identifier: Apache-2.0
"""Training of the small CLIP's two heads by InfoNCE: each picture knows its text, each text its picture."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.config import ClipTrainConfig
from cogview.data.fingerprint import fingerprint
from cogview.data.order import batch_indices
from cogview.data.pairs import Pairs, open_pairs
from cogview.device import default_device
from cogview.files import StrPath
from cogview.perception.clip import TOGETHER, Heads, SmallClip, SmallClipConfig, save_clip
from cogview.progress import Progress
from cogview.seeding import derive_seed
from cogview.settings import check_settings, write_settings
from cogview.training.checkpoint import check_resumable, latest_checkpoint
from cogview.training.lock import RunLock
from cogview.training.loop import History, StepResult, Trainer, backward, descend, run_loop, set_learning_rate
from cogview.training.optim import cosine_to_zero

SETTINGS = "train-clip.json"
MOST_CAPTIONS = 4  # of a picture: more say the same in other words


class Features(NamedTuple):
    """What the frozen towers see, once for the whole training."""

    images: Tensor  # [N, 1280]
    texts: Tensor  # [M, 384]
    first: Tensor  # int64 [N + 1]: the texts of picture i are first[i] to first[i + 1] - 1


def latin_captions(captions: Sequence[str]) -> list[str]:
    """Those in Latin letters, which the text tower reads; some of them, evenly, where there are many."""
    read = [text for text in captions if all(map(_is_latin, filter(str.isalpha, text)))]
    stride = -(-len(read) // MOST_CAPTIONS)
    return read[:: max(stride, 1)]


def _is_latin(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith("LATIN")


def see(clip: SmallClip, pairs: Pairs, size: int, *, progress: bool = True) -> Features:
    """What the towers make of pictures and captions. ValueError for captions in other letters."""
    captions = [latin_captions(pairs.captions(index)) for index in range(len(pairs))]
    kept = [index for index, texts in enumerate(captions) if texts]
    if len(kept) < 2:  # A single one is always right.
        raise ValueError(
            "two pictures or more need a caption in Latin letters, which the text tower (English) reads, got "
            f"{len(kept)}"
        )
    seen = []
    with Progress(len(kept), "look at pictures", unit="image", enabled=progress) as bar, torch.no_grad():
        for start in range(0, len(kept), TOGETHER):
            part = kept[start : start + TOGETHER]
            images = torch.stack([pairs.image(index, size) for index in part])
            seen.append(clip.images(images.to(clip.heads.log_scale.device)))
            bar.update(len(part))
    texts = [text for index in kept for text in captions[index]]
    unique = list(dict.fromkeys(texts))
    place = {text: number for number, text in enumerate(unique)}
    read = clip.texts(unique)[[place[text] for text in texts]]
    first = torch.tensor([0, *(len(captions[index]) for index in kept)], device="cpu").cumsum(0)
    return Features(torch.cat(seen), read.to(seen[0].device), first)


class ClipTrainer(Trainer):
    """Symmetric cross-entropy over the cosines of a batch, AdamW, a cosine to zero."""

    label = "train CLIP"
    board = "clip"
    checkpoints = "clip-checkpoints"
    recorded = ("loss", "right")

    def __init__(self, heads: Heads, features: Features, config: ClipTrainConfig) -> None:
        self.model: Heads = heads
        heads.requires_grad_(True)
        self.features, self.config = features, config
        self.batch_size = min(config.batch_size, len(features.images))
        self.optimizer = torch.optim.AdamW(
            heads.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.optimizers = {"optimizer": self.optimizer}
        self._schedule = cosine_to_zero(config.steps)

    def batches(self, first: int) -> Iterator[list[int]]:
        for step in range(first, self.config.steps):
            yield batch_indices(self.config.seed, step, self.batch_size, len(self.features.images))

    def step(self, step: int, batch: list[int]) -> StepResult:
        torch.manual_seed(derive_seed(self.config.seed, "clip", step))
        set_learning_rate(self.optimizer, self.config.learning_rate * float(self._schedule[step]))
        pictures = torch.tensor(batch, device="cpu")
        first, end = self.features.first[pictures], self.features.first[pictures + 1]
        share = torch.rand(len(batch), dtype=torch.float32, device="cpu")
        chosen = first + (share * (end - first)).long()
        device = self.features.images.device
        logits = self.model.logits(
            self.features.images[pictures.to(device)], self.features.texts[chosen.to(device)]
        )
        own = torch.arange(len(batch), device=device)
        loss = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own))
        backward(loss)
        right = (logits.argmax(1) == own).float().mean()
        return StepResult({"right": right}, descend(loss, self.model, self.optimizer))

    def shown(self, values: Mapping[str, float]) -> str:
        return f"loss {values['loss']:.3f}, right in the batch {values['right']:.1%}"


@dataclass(frozen=True)
class TrainClip:
    """Train a small CLIP on ``data`` into the folder ``out``."""

    data: StrPath
    out: StrPath
    train: ClipTrainConfig = field(default_factory=ClipTrainConfig)
    shape: SmallClipConfig = field(default_factory=SmallClipConfig)
    device: str = field(default_factory=default_device)
    progress: bool = True


@dataclass(frozen=True)
class ClipSettings:
    """What a CLIP was trained with, ``train-clip.json`` in its folder."""

    data: str
    train: ClipTrainConfig
    shape: SmallClipConfig


def train_clip(options: TrainClip, pairs: Pairs | None = None) -> History:
    """Train the heads, or go on from the latest checkpoint; loss and share right in the batch per step.

    ``pairs``: in place of those that ``options.data`` names.

    Raises:
        ValueError: the folder was started with other settings or data; too few captions in Latin letters.
        FileNotFoundError, ModuleNotFoundError: no such data, or a tower's package is not installed.
    """
    with RunLock(options.out) as lock:
        out = Path(options.out)
        pairs = open_pairs(options.data) if pairs is None else pairs
        origin = {"data": fingerprint(pairs)}
        settings = ClipSettings(str(options.data), options.train, options.shape)
        saved = latest_checkpoint(out / ClipTrainer.checkpoints)
        if saved is not None:
            check_settings(out / SETTINGS, settings)
            check_resumable(saved, origin)
        torch.manual_seed(derive_seed(options.train.seed, "init clip"))
        clip = SmallClip(options.shape).to(options.device)
        pairs.check(options.train.image_size, progress=options.progress)
        features = see(clip, pairs, options.train.image_size, progress=options.progress)
        lock.take()
        write_settings(out / SETTINGS, settings)
        trainer = ClipTrainer(clip.heads, features, options.train)
        trainer.origin = origin
        history = run_loop(trainer, options.train, out, progress=options.progress)
        save_clip(out, options.shape, clip.heads)
        return history
