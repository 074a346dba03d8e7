# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance and its statistics, against NumPy, SciPy and Gaussians whose distance is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from cogview.evaluation.frechet import FeatureStatistics, frechet_distance


def statistics_of(features, chunk=77):
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(chunk):
        statistics.update(part)
    return statistics


def two_sets(few=300, width=24, shift=5.0):
    mixing = torch.randn(width, width, dtype=torch.float64)
    first = torch.randn(500, width, dtype=torch.float64) * 2 + shift
    return first, torch.randn(few, width, dtype=torch.float64) @ mixing


def published(first, second):
    """The arithmetic of pytorch-fid 0.3.0, and that of torch-fidelity 0.4.0."""
    (m1, s1), (m2, s2) = ((x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)) for x in (first, second))
    apart = (m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2)
    by_root = apart - 2 * np.trace(sqrtm(s1 @ s2).real)
    by_eigenvalues = apart - 2 * np.sqrt(np.linalg.eigvals(s1 @ s2).astype("complex128")).real.sum()
    return by_root, by_eigenvalues


def test_the_distance_is_that_of_the_published_programs():
    first, second = two_sets()
    distance = frechet_distance(statistics_of(first), statistics_of(second))
    for figure in published(first, second):
        assert distance == pytest.approx(figure, rel=1e-9)


def test_with_fewer_pictures_than_features_the_distance_is_still_that_of_the_eigenvalues():
    first, second = two_sets(few=10)
    distance = frechet_distance(statistics_of(first), statistics_of(second))
    # The eigenvalues of a singular, unsymmetric product have errors, and the roots of zeros larger ones.
    assert distance == pytest.approx(published(first, second)[1], rel=1e-5)


def test_gaussians_on_a_line_and_a_set_against_itself():
    first = torch.tensor([[-1.0], [1.0]])  # mean 0, variance 2
    second = torch.tensor([[7.0], [13.0]])  # mean 10, variance 18
    expected = 10**2 + (18**0.5 - 2**0.5) ** 2
    assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(expected)
    same, _ = two_sets()
    assert frechet_distance(statistics_of(same), statistics_of(same)) < 1e-9


def test_statistics_are_those_of_numpy_in_any_batches_even_far_from_zero():
    features, _ = two_sets(shift=1e6)
    for chunk in (1, 77, 500):
        statistics = statistics_of(features, chunk)
        np.testing.assert_allclose(statistics.mean, features.numpy().mean(0), rtol=1e-13)
        np.testing.assert_allclose(
            statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-6, atol=1e-8
        )
    halves = statistics_of(features[:123])
    halves.merge(statistics_of(features[123:]))
    torch.testing.assert_close(halves.covariance, statistics.covariance)
    restored = FeatureStatistics.of_tensors(halves.tensors())
    assert restored.count == 500
    assert frechet_distance(restored, halves) < 1e-6


def test_what_has_no_distance_is_refused():
    one = statistics_of(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        frechet_distance(one, one)
    with pytest.raises(ValueError, match="features of one network, got 3 and 4 numbers"):
        frechet_distance(statistics_of(torch.zeros(5, 3)), statistics_of(torch.zeros(5, 4)))
    with pytest.raises(FloatingPointError, match="not finite"):
        FeatureStatistics(2).update(torch.tensor([[0.0, torch.nan]]))
