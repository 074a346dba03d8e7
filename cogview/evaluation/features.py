# SPDX-License-Identifier: Apache-2.0
"""What a network sees in a picture, as numbers to compare pictures by.

One is :class:`cogview.perception.efficientnet.EfficientNetLite0Features`, whose weights install with pip. The
network that defines the FID is in :mod:`cogview.evaluation.inception`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Features(Protocol):
    """A frozen network that turns pictures into feature vectors."""

    name: str  # of the network, as figures made with its features are labelled
    distance: str  # what the Frechet distance of its features is called
    score: str  # what the formula of the Inception Score is called with its classes
    width: int  # numbers that it gives a picture

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures ``[N, 3, H, W]``, uint8 or floats in [0, 1], as float32 features ``[N, width]``."""

    def class_logits(self, features: Tensor) -> Tensor:
        """Logits of the classes ``[N, classes]`` from features, for the Inception Score."""
