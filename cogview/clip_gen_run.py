# SPDX-License-Identifier: Apache-2.0
"""A run of CLIP-GEN, which draws from texts without ever having read a caption, and ranks what it drew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args, overload

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cogview.config import SamplingConfig
from cogview.device import usable_device
from cogview.files import StrPath, digest
from cogview.generation.clip_gen import draw_from_embeddings
from cogview.generation.engine import DrawOptions
from cogview.images import to_picture
from cogview.model.clip_gen import ClipGen
from cogview.model.memory import rows_that_fit
from cogview.perception.clip import Clip, fingerprint_clip, load_clip
from cogview.progress import Progress
from cogview.run import MAX_BATCH, Run, listed_texts, require_num, valid_text
from cogview.settings import load_settings
from cogview.tokens.tokenizers import IMAGE_TOKENIZER, load_image_tokenizer
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.checkpoint import (
    check_origin,
    fingerprint_weights,
    load_model,
    require_checkpoint,
)
from cogview.training.clip_gen import CHECKPOINTS, SETTINGS, ClipGenSettings
from cogview.weights import without_values

Rank = Literal["clip", "cap-loss", "both"]


class ClipDrawing(NamedTuple):
    """A picture that was drawn, and how well it fits its text."""

    image: Image.Image
    text: str
    candidate: int  # its number among the pictures of its text, from 0
    cosine: float  # between its embedding and that of the text; higher is better
    loss: float  # CapLoss, NaN without a captioner; lower is better


@dataclass
class ClipGenRun:
    """A trained CLIP-GEN with its image tokenizer and its CLIP."""

    model: ClipGen
    tokenizer: ImageTokenizer
    clip: Clip
    settings: ClipGenSettings
    fingerprint: str  # of the weights and of the CLIP

    @property
    def sampling(self) -> SamplingConfig:
        """How the run draws unless told otherwise."""
        return self.settings.sampling

    @overload
    def generate(
        self,
        texts: str,
        *,
        num: int = ...,
        seed: int = ...,
        sampling: SamplingConfig | None = ...,
        rank: Rank = ...,
        captioner: Run | None = ...,
        progress: bool = ...,
    ) -> list[ClipDrawing]: ...
    @overload
    def generate(
        self,
        texts: list[str] | tuple[str, ...],
        *,
        num: int = ...,
        seed: int = ...,
        sampling: SamplingConfig | None = ...,
        rank: Rank = ...,
        captioner: Run | None = ...,
        progress: bool = ...,
    ) -> list[list[ClipDrawing]]: ...
    def generate(self, texts, *, num=16, seed=0, sampling=None, rank="clip", captioner=None, progress=False):
        """Draw ``num`` pictures for each text, best first: a list for one text, a list of lists for several.

        Args:
            texts, num, sampling, progress: as :meth:`cogview.Run.generate` takes them.
            seed: another seed gives other pictures; one for all texts.
            rank: by the cosine between embeddings ("clip"), by the CapLoss of ``captioner`` ("cap-loss"), or
                by the sum of a picture's places in both orders ("both").

        Raises:
            ValueError: a text that is empty or no valid Unicode, ``num`` below 1 or above 100,000, a rank
                that is not known or needs a captioner without one.
            TypeError: texts that are neither ``str`` nor a list of them.
        """
        several = [valid_text(text) for text in listed_texts(texts)]
        if any(not text.strip() for text in several):
            raise ValueError("the text is empty")
        require_num(num)
        if rank not in get_args(Rank):
            raise ValueError(f"rank must be one of {', '.join(get_args(Rank))}, got {rank!r}")
        if rank != "clip" and captioner is None:
            raise ValueError(f"rank {rank} needs a captioner")
        total = len(several) * num * self.tokenizer.config.codes_per_image
        with Progress(total, "draw", unit="code", enabled=progress) as bar:
            weight = self.model.condition.weight
            fitting = rows_that_fit(self.model.config, weight.dtype, weight.device, MAX_BATCH)
            options = DrawOptions(sampling or self.sampling, seed, max_batch=fitting, on_step=bar.update)
            rows = self._drawn(several, num, options, captioner)
        rows = [ranked(row, rank) for row in rows]
        return rows[0] if isinstance(texts, str) else rows

    def _drawn(
        self, texts: list[str], num: int, options: DrawOptions, captioner: Run | None
    ) -> list[list[ClipDrawing]]:
        """The drawings of each text, in the order in which they were drawn."""
        embeddings = self.clip.of_texts(texts)
        rows: list[list[ClipDrawing]] = [[] for _ in texts]
        for batch in draw_from_embeddings(self.model, embeddings, num, options):
            pixels = self.decode(batch.codes)
            own = embeddings[batch.requests].to(pixels.device)
            cosines = F.cosine_similarity(self.embed(pixels), own).tolist()
            told = [texts[place] for place in batch.requests]
            losses = [float("nan")] * len(told)
            if captioner is not None:
                losses = captioner.cap_loss(told, list(pixels.cpu()))
            drawn = zip(batch.requests, pixels, told, batch.numbers, cosines, losses, strict=True)
            for place, image, *about in drawn:
                rows[place].append(ClipDrawing(to_picture(image.cpu()), *about))
        return rows

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        """Embeddings of pictures ``[N, 3, H, W]``."""
        return self.clip.of_images(pixels)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[n, num_codes]`` as pixels ``[n, 3, S, S]``."""
        grid = self.tokenizer.config.grid
        return self.tokenizer.decode(codes.view(-1, grid, grid).to(self.tokenizer.mean.device))


def ranked(row: Sequence[ClipDrawing], rank: Rank) -> list[ClipDrawing]:
    """The drawings of one text, best first."""
    cosines = torch.tensor([drawing.cosine for drawing in row], dtype=torch.float64, device="cpu")
    losses = torch.tensor([drawing.loss for drawing in row], dtype=torch.float64, device="cpu")
    order = costs_of_ranks(cosines, losses)[rank].argsort(stable=True)
    return [row[place] for place in order.tolist()]


def costs_of_ranks(cosines: Tensor, losses: Tensor | None = None) -> dict[Rank, Tensor]:
    """For each rank a cost of every candidate ``[..., M]``: the best one costs least.

    Args:
        cosines: between each candidate's embedding and its text's.
        losses: CapLoss of each; without it there is but the rank by CLIP.

    That of "both" is the mean of a candidate's places in the two orders; of equals, CLIP chooses.
    """
    costs: dict[Rank, Tensor] = {"clip": -cosines}
    if losses is not None:
        by_clip, by_loss = (_places(cost) for cost in (-cosines, losses))
        tie = by_clip / (4 * max(1, cosines.shape[-1]))  # below the half place by which means differ
        costs |= {"cap-loss": losses, "both": (by_clip + by_loss) / 2 + tie}
    return costs


def _places(costs: Tensor) -> Tensor:
    """The place of each candidate when the cheapest comes first, from 0."""
    return costs.argsort(dim=-1, stable=True).argsort(dim=-1).double()


def load_clip_gen(
    folder: StrPath, device: torch.device | str | None = None, clip: StrPath | None = None
) -> ClipGenRun:
    """The run of a folder that ``cogview train-clip-gen`` wrote, with its latest weights.

    Args:
        clip: where the CLIP of the training lies now; by default where it lay then.

    FileNotFoundError or ValueError, each naming the file and the way out.
    """
    folder, device = Path(folder), usable_device(device)
    hint = f"train it first: cogview train-clip-gen --data DATA --clip CLIP --out {folder}"
    checkpoint = require_checkpoint(folder / CHECKPOINTS, hint)
    settings = load_settings(ClipGenSettings, folder / SETTINGS, hint)
    check_origin(checkpoint, {"tokenizers": digest(folder / IMAGE_TOKENIZER)})
    its_clip = load_clip(clip or settings.clip, device)
    if its_clip.width != settings.embedding_width:
        raise ValueError(
            f"{folder} was trained with embeddings of {settings.embedding_width} numbers, the CLIP in "
            f"{clip or settings.clip} has {its_clip.width}; give the one of the training with --clip"
        )
    of_clip = fingerprint_clip(clip or settings.clip)
    check_origin(checkpoint, {"clip": of_clip})
    with without_values():
        model = ClipGen(settings.model, settings.embedding_width)
    load_model(checkpoint, model)
    tokenizer = load_image_tokenizer(folder, device)
    fingerprint = f"{fingerprint_weights(checkpoint)} {of_clip}"
    return ClipGenRun(model.to(device).eval(), tokenizer, its_clip, settings, fingerprint)
