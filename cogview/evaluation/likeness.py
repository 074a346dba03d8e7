# SPDX-License-Identifier: Apache-2.0
"""How like rebuilt or enlarged pictures are to the true ones: in a network's features, and in sharpness."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.perception.efficientnet import EfficientNetLite0Features

SIDE = 96  # pixels to which pictures are enlarged for the network
TOGETHER = 64  # pictures that the network sees at once


class Likeness:
    """Compares pictures with ``truth`` ``[N, 3, H, W]`` in [0, 1].

    By the last features of EfficientNet-Lite0, which nothing here is trained to meet; a VQGAN may be trained
    to meet earlier ones. ModuleNotFoundError where its weights are not installed.
    """

    def __init__(self, truth: Tensor) -> None:
        self._network = EfficientNetLite0Features(side=SIDE)
        self._features = self._seen(truth)
        self._energy = gradient_energy(truth)

    def __call__(self, pictures: Tensor) -> dict[str, float]:
        """``feature_distance``: the mean of 1 - cosine. ``sharpness``: 1 is as sharp, below is blurred.

        The latter is the energy of differences between neighbouring pixels over that of the true pictures.
        """
        cosine = F.cosine_similarity(self._seen(pictures), self._features)
        return {
            "feature_distance": (1 - cosine).mean().item(),
            "sharpness": (gradient_energy(pictures) / self._energy).item(),
        }

    @torch.no_grad()
    def _seen(self, pictures: Tensor) -> Tensor:
        return torch.cat([self._network(part) for part in pictures.split(TOGETHER)])


def gradient_energy(pictures: Tensor) -> Tensor:
    """Mean squared difference between neighbours, across and down."""
    across, down = pictures.diff(dim=3).square().mean(), pictures.diff(dim=2).square().mean()
    return across + down
