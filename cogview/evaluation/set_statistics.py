# SPDX-License-Identifier: Apache-2.0
"""What is kept of a set of pictures to compare it with others: of one size, however many they are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cogview.evaluation.features import Features
from cogview.evaluation.frechet import FeatureStatistics, frechet_distance
from cogview.evaluation.inception_score import InceptionScore, Score
from cogview.evaluation.pictures import PictureFolder, blurred
from cogview.files import StrPath, load_tensors, save_tensors
from cogview.progress import Progress

BLUR_RADII = (0.0, 1.0, 2.0, 4.0, 8.0)  # of the paper's Table 1, in pixels
STATISTICS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class SetStatistics:
    """A set of pictures as one network sees it, under each blur."""

    network: str  # Features.name
    side: int  # of the pictures, in pixels
    by_radius: dict[float, FeatureStatistics]
    score: Score  # of the pictures without blur

    @property
    def count(self) -> int:
        """Pictures."""
        return next(iter(self.by_radius.values())).count

    def save(self, path: StrPath) -> None:
        """Write a file that :func:`load_statistics` reads."""
        tensors = {"score": torch.tensor(self.score, dtype=torch.float64)}
        for radius, statistics in self.by_radius.items():
            head = f"{self.network}/{self.side}/{radius:g}"
            tensors |= {f"{head}/{name}": tensor for name, tensor in statistics.tensors().items()}
        save_tensors(path, tensors)


def load_statistics(path: StrPath) -> SetStatistics:
    """What :meth:`SetStatistics.save` wrote. FileNotFoundError, or ValueError for any other file."""
    tensors = load_tensors(path)
    try:
        score = Score(*tensors.pop("score").tolist())
        heads = {name.rpartition("/")[0] for name in tensors}
        # A name that does not match has no groups: the AttributeError is caught below.
        parts = {head: re.fullmatch(r"(.+)/(\d+)/([\d.]+)", head).groups() for head in heads}  # type: ignore[union-attr]
        ((network, side),) = {(network, int(side)) for network, side, _ in parts.values()}
        by_radius = {
            float(radius): FeatureStatistics.of_tensors(
                {name: tensors[f"{head}/{name}"] for name in ("count", "mean", "scatter")}
            )
            for head, (_, _, radius) in parts.items()
        }
        return SetStatistics(network, side, dict(sorted(by_radius.items())), score)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path} holds no statistics of pictures; cogview evaluate writes them") from None


FEW = 10  # pictures of a part of the score


@torch.inference_mode()
def picture_statistics(
    pictures: PictureFolder,
    network: Features,
    device: torch.device | str,
    *,
    radii: Sequence[float] = BLUR_RADII,
    splits: int = 10,
    batch_size: int = 32,
    progress: bool = True,
) -> SetStatistics:
    """Read all pictures once. Memory does not depend on their number.

    A set of fewer pictures than the network has features gives a warning: its covariance is singular, and its
    Frechet distance from any set too large. The score has fewer than ``splits`` parts where these would have
    fewer than two pictures, and fewer than ten a part give a warning: of one picture the score is always 1.
    """
    if len(pictures) <= network.width:
        warnings.warn(
            f"{pictures.folder} has {len(pictures)} pictures, not more than the {network.width} features of "
            f"{network.name}: its distances are too large; compare them only with those of as many pictures",
            stacklevel=3,
        )
    by_radius = {float(radius): FeatureStatistics(network.width) for radius in (0, *radii)}
    parts = min(splits, max(1, len(pictures) // 2))
    if len(pictures) < FEW * parts:
        warnings.warn(
            f"{pictures.folder} has {len(pictures)} pictures, fewer than {FEW} for each of {parts} parts: "
            f"its {network.score} says little; it needs {FEW * parts} pictures, or fewer --splits",
            stacklevel=3,
        )
    score = InceptionScore(len(pictures), parts)
    label = f"read {pictures.folder.name}"
    with Progress(len(pictures), label, unit="image", enabled=progress) as bar:
        for images in pictures.batches(min(batch_size, len(pictures))):
            for radius, statistics in by_radius.items():
                features = network(blurred(images, radius).to(device))
                statistics.update(features)
                if not radius:
                    score.update(network.class_logits(features))
            bar.update(len(images))
    return SetStatistics(network.name, pictures.side, by_radius, score.result())


def require_comparable(first: tuple[str, int], second: tuple[str, int]) -> None:
    """ValueError for sets that were seen by different networks, or whose pictures have different sides."""
    if first[0] != second[0]:
        raise ValueError(
            f"both sets must be seen by one network, got {first[0]} and {second[0]}; evaluate the "
            "pictures of one of them anew"
        )
    if first[1] != second[1]:
        raise ValueError(
            f"both sets must have pictures of one size, got {first[1]}x{first[1]} and "
            f"{second[1]}x{second[1]} pixels; --size {min(first[1], second[1])} scales both"
        )


def distances(first: SetStatistics, second: SetStatistics) -> dict[float, float]:
    """The Frechet distance under each blur that both sets have. Raises as :func:`require_comparable`."""
    require_comparable((first.network, first.side), (second.network, second.side))
    common = [radius for radius in first.by_radius if radius in second.by_radius]
    return {radius: frechet_distance(first.by_radius[radius], second.by_radius[radius]) for radius in common}
