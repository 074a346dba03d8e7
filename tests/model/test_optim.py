# SPDX-License-Identifier: Apache-2.0
import math
from itertools import pairwise

import pytest

from cogview.config import TrainConfig
from cogview.training.optim import learning_rate, make_optimizer, parameter_groups
from tests.model.helpers import small_model


def test_biases_and_layernorms_do_not_decay_embeddings_do():
    model = small_model()
    decayed, free = parameter_groups(model, 0.04)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.04, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {name for name in names.values() if "layernorm" in name or name.endswith("bias")}
    assert {names[id(parameter)] for parameter in free["params"]} == expected
    assert {names[id(parameter)] for parameter in decayed["params"]} == set(names.values()) - expected
    assert "word_embeddings.weight" not in expected


def test_schedule():
    config = TrainConfig(steps=1000, learning_rate=1.0, warmup_fraction=0.1, final_lr_fraction=0.1)
    assert learning_rate(0, config) == pytest.approx(0.01)
    assert learning_rate(99, config) == pytest.approx(1.0)
    assert learning_rate(100, config) == pytest.approx(1.0)
    assert learning_rate(600, config) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    rates = [learning_rate(step, config) for step in range(1000)]
    assert all(later < earlier for earlier, later in pairwise(rates[100:]))
    assert 0.1 < rates[-1] < 0.13  # the period is the whole run, so the end point is not quite reached


def test_the_optimizer_takes_the_configured_betas():
    optimizer = make_optimizer(small_model(), TrainConfig(betas=(0.8, 0.9)))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
