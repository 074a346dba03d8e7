# SPDX-License-Identifier: Apache-2.0
"""Who decides which drawing in which skin tone a picture of the data ``emoji`` shows.

The judge knows real pictures of training alone and never sees one that a model drew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from cogview.data.emoji import TONES, Drawing, EmojiPairs, held_out_combinations, training_pairs
from cogview.perception.efficientnet import EfficientNetLite0Features

# OpenMoji's fills of skin in TONES' order.
PALETTE = ("#fadcbc", "#debb90", "#c19a65", "#a57939", "#6a462f")
NEAR = 0.06  # distance in RGB, each in [0, 1], that makes a pixel half a pixel of that fill or less
SIDE = 96  # pixels to which pictures are enlarged for the network
STAGE = 4  # of the network's seven, behind which its map still tells where things are: 80 x 6 x 6 numbers
TOGETHER = 64  # pictures that the network sees at once


@dataclass(frozen=True)
class Reading:
    """What the judge reads in N pictures."""

    tones: Tensor  # int64 [N], places in TONES
    drawings: Tensor  # int64 [N], places in the judge's drawings


class NearestPicture:
    """Which of some real pictures another one is most like.

    Goes by the cosine between feature maps of EfficientNet-Lite0 halfway up, where they still tell where
    things are.

    Args:
        references: ``[N, 3, H, H]`` in [0, 1].
        features: the network; by default with the weights of the installed package.
    """

    def __init__(self, references: Tensor, features: EfficientNetLite0Features | None = None) -> None:
        self._network = features or EfficientNetLite0Features(side=SIDE)
        self._features = self._normalised(references)

    def __call__(self, images: Tensor) -> Tensor:
        """Places among the references, int64 ``[M]``, of pictures ``[M, 3, H, H]``."""
        return (self._normalised(images) @ self._features.t()).argmax(1)

    def _normalised(self, images: Tensor) -> Tensor:
        parts = [self._network.maps(part, [STAGE])[0].flatten(1) for part in images.split(TOGETHER)]
        return F.normalize(torch.cat(parts), dim=1)


class EmojiJudge:
    """Reads pictures of one size.

    The tone goes by colour: a logistic regression on how many pixels are near each of the five fills of skin.
    The drawing is that of the nearest real picture, by the cosine between feature maps of EfficientNet-Lite0
    halfway up, among all drawings that have tones, each in the colours that training sees. The network's
    last features, averaged over the picture, forget where things are: they read 72 % of the real held-out
    pictures at 32 pixels right, these 81 %.

    Args:
        size: side of the pictures in pixels.
        references: real pictures to compare with; by default those of the training.
        features: the network; by default with the weights of the installed package.
    """

    def __init__(
        self,
        size: int,
        references: EmojiPairs | None = None,
        features: EfficientNetLite0Features | None = None,
    ) -> None:
        self.size = size
        references = references or with_tones(training_pairs())
        images = references.images(size)
        self.drawings: tuple[Drawing, ...] = tuple(
            sorted({picture.drawing for picture in references.pictures}, key=lambda drawing: drawing.code)
        )
        self._places = {drawing: place for place, drawing in enumerate(self.drawings)}
        self._shown = torch.tensor([self._places[picture.drawing] for picture in references.pictures])
        self._nearest = NearestPicture(images, features)
        toned = [place for place, picture in enumerate(references.pictures) if picture.tone]
        tones = [TONES.index(tone) for picture in references.pictures if (tone := picture.tone)]
        self._regression = LogisticRegression(C=10.0, max_iter=2000).fit(_skin(images[toned]), tones)

    def __call__(self, images: Tensor) -> Reading:
        """Read pictures ``[N, 3, size, size]`` in [0, 1]. ValueError for pictures of another size."""
        if images.shape[1:] != (3, self.size, self.size):
            expected = f"[N, 3, {self.size}, {self.size}]"
            raise ValueError(f"images must be {expected} as the judge was made, got {list(images.shape)}")
        tones = torch.from_numpy(self._regression.predict(_skin(images.float())))
        return Reading(tones, self._shown[self._nearest(images.float())])

    def expected(self, pairs: EmojiPairs) -> Reading:
        """What toned pictures should be read as."""
        tones = [TONES.index(tone) for picture in pairs.pictures if (tone := picture.tone)]
        drawings = [self._places[picture.drawing] for picture in pairs.pictures]
        return Reading(torch.tensor(tones), torch.tensor(drawings))

    def real(self, pairs: EmojiPairs | None = None) -> Reading:
        """What the judge reads in real pictures, by default those that no training sees."""
        return self((pairs or held_out_combinations()).images(self.size))


def with_tones(pairs: EmojiPairs) -> EmojiPairs:
    """The pictures in colour of drawings that have skin tones; those without one as well."""
    drawings = {picture.drawing for picture in pairs.pictures if picture.tone}
    chosen = [p for p in pairs.pictures if p.style == "color" and p.drawing in drawings]
    return EmojiPairs(chosen)


def _skin(images: Tensor) -> np.ndarray:
    """How many pixels are near each fill of skin, as logarithms ``[N, 5]``."""
    levels = [[int(fill[at : at + 2], 16) for at in (1, 3, 5)] for fill in PALETTE]
    fills = torch.tensor(levels, dtype=torch.float32) / 255
    distance = (images.cpu()[:, None] - fills[None, :, :, None, None]).norm(dim=2)
    return torch.exp(-((distance / NEAR) ** 2)).sum((2, 3)).log1p().numpy()
