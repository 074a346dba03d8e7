# SPDX-License-Identifier: Apache-2.0
"""Who decides which digit a drawing shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor

from cogview.data.digits import SCAN_SIDE, splits


class Judge:
    """A support vector machine fitted to the real training scans; it never sees a generated picture."""

    def __init__(self) -> None:
        scans, labels = splits()["train"]
        self._classifier = SVC(gamma=0.001, C=10.0).fit(scans, labels)
        self.test_accuracy = float(self._classifier.score(*splits()["test"]))

    def __call__(self, images: Tensor) -> Tensor:
        """Digit shown by each of ``[N, 3, S, S]`` in [0, 1], averaged down to 8x8; int64 ``[N]``."""
        scans = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), SCAN_SIDE)
        return torch.from_numpy(self._classifier.predict((scans.flatten(1) * 16).cpu().numpy()))
