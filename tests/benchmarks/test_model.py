# SPDX-License-Identifier: Apache-2.0
"""What ``python -m benchmarks.model`` times is what it says."""

from __future__ import annotations

import torch

from benchmarks import model as timed
from cogview.model.transformer import CogView


def test_the_training_step_moves_every_weight():
    model = CogView(timed.TINY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    timed.training(model, timed.Sizes(rows=2, repeat=1), torch.device("cpu"))
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
