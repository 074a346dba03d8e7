# SPDX-License-Identifier: Apache-2.0
"""How like pictures are to the true ones."""

from __future__ import annotations

import pytest
import torch

from cogview.evaluation.likeness import Likeness, gradient_energy


def test_a_blurred_picture_is_less_sharp_and_itself_as_sharp():
    real = torch.rand(4, 3, 32, 32)
    likeness = Likeness(real)
    blurred = likeness(torch.nn.functional.avg_pool2d(real, 3, 1, 1))
    assert 0 < blurred["sharpness"] < 0.5 and blurred["feature_distance"] > 0
    itself = likeness(real)
    assert itself["sharpness"] == 1 and itself["feature_distance"] == pytest.approx(0, abs=1e-6)
    assert gradient_energy(real) == pytest.approx(2 / 6, rel=0.1)  # of independent uniform pixels
