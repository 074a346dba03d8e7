# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance between two sets of pictures, from statistics that take constant memory.

Source: arXiv:1706.08500. With the features of :class:`cogview.evaluation.inception.InceptionFeatures` it is
the FID; with the features of another network it is another figure.
"""

from __future__ import annotations

from collections.abc import Mapping

import scipy.linalg
import torch
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of feature vectors that come in batches, in float64.

    ``mean`` and ``covariance`` are NumPy's ``mean(axis=0)`` and ``cov(rowvar=False)`` of all vectors so far.
    Batches are joined about their own means (Chan et al., 1979), so nothing is lost however far the features
    lie from zero.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)  # sum of outer products about the mean

    def update(self, features: Tensor) -> None:
        """Add ``[N, width]``. FloatingPointError for a feature that is not finite."""
        if not len(features):
            return
        batch = features.detach().to("cpu", torch.float64)
        if not bool(batch.isfinite().all()):
            raise FloatingPointError("features are not finite: the network's weights are damaged")
        mean = batch.mean(0)
        centred = batch - mean
        self._join(len(batch), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the vectors of ``other``."""
        self._join(other.count, other.mean, other._scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if not total:
            return
        apart = mean - self.mean
        self._scatter += scatter + torch.outer(apart, apart) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """``[width, width]``. ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {self.count}")
        return self._scatter / (self.count - 1)

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`of_tensors` reads."""
        return {
            "count": torch.tensor([self.count], dtype=torch.int64),
            "mean": self.mean,
            "scatter": self._scatter,
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> FeatureStatistics:
        """From what :meth:`tensors` gave. ValueError or KeyError for anything else."""
        mean, scatter = tensors["mean"], tensors["scatter"]
        if mean.dim() != 1 or scatter.shape != (len(mean), len(mean)) or tensors["count"].shape != (1,):
            raise ValueError(f"statistics must be [D] and [D, D], got {mean.shape} and {scatter.shape}")
        statistics = cls(len(mean))
        statistics.count = int(tensors["count"])
        statistics.mean, statistics._scatter = mean.double(), scatter.double()
        return statistics


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh``, which did not converge on a blurred set of fewer pictures than features."""
    values, vectors = scipy.linalg.eigh(matrix.numpy(), driver="evr")
    return torch.from_numpy(values), torch.from_numpy(vectors)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """``|m1 - m2|^2 + trace(S1 + S2 - 2 (S1 S2)^(1/2))`` of means ``m`` and covariances ``S``.

    The trace of the root is taken from the symmetric ``S1^(1/2) S2 S1^(1/2)``, which has the eigenvalues of
    ``S1 S2``. They cannot come out complex or negative beyond rounding, also where there are fewer pictures
    than features. Raises ValueError for features of another width, and for fewer than two pictures.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"both sets must have features of one network, got {len(first.mean)} and {len(second.mean)} "
            "numbers a picture"
        )
    values, vectors = _eigh(first.covariance)
    root = vectors * values.clamp(min=0).sqrt()
    common = _eigh(root.T @ second.covariance @ root)[0].clamp(min=0).sqrt().sum()
    apart = (first.mean - second.mean).square().sum()
    distance = apart + first.covariance.trace() + second.covariance.trace() - 2 * common
    return max(distance.item(), 0.0)
