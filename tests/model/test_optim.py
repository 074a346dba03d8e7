# SPDX-License-Identifier: Apache-2.0
import math
from itertools import pairwise

import pytest
import torch

from cogview.config import TrainConfig
from cogview.training.optim import learning_rate, make_optimizer, parameter_groups, shrunk_gradient
from cogview.training.transformer import TransformerTrainer
from tests.model.helpers import small_model
from tests.model.test_training_transformer import dataset


def test_biases_and_layernorms_do_not_decay_embeddings_do():
    model = small_model()
    decayed, free = parameter_groups(model, 0.04)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.04, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {name for name in names.values() if "layernorm" in name or name.endswith("bias")}
    assert {names[id(parameter)] for parameter in free["params"]} == expected
    assert {names[id(parameter)] for parameter in decayed["params"]} == set(names.values()) - expected
    assert "word_embeddings.weight" not in expected


def test_a_shrunk_gradient_is_that_of_the_formula_and_leaves_the_values_and_the_head_alone():
    tokens = torch.randint(0, 60, (2, 9))
    model = small_model(scale=5.0)
    embedding = model.word_embeddings

    def outcome():
        x = embedding(tokens)
        loss = (x @ embedding.weight.t()).logsumexp(-1).sum()
        return x, *torch.autograd.grad(loss, embedding.weight)

    x, whole = outcome()
    with shrunk_gradient(embedding, 0.1):
        same, shrunk = outcome()
    assert torch.equal(x, same)
    x = embedding(tokens)
    formula = 0.1 * x + 0.9 * x.detach()
    loss = (formula @ embedding.weight.t()).logsumexp(-1).sum()
    (expected,) = torch.autograd.grad(loss, embedding.weight)
    torch.testing.assert_close(shrunk, expected)
    assert not torch.allclose(shrunk, whole)
    assert torch.equal(outcome()[1], whole)
    with shrunk_gradient(embedding, 1.0):
        assert torch.equal(outcome()[1], whole)


def test_training_shrinks_the_gradient_of_the_embeddings_only():
    gradients = []
    for factor in (1.0, 0.1):
        model = small_model().train()
        trainer = TransformerTrainer(model, dataset(), TrainConfig(batch_size=8, embedding_gradient=factor))
        trainer._gradient(0, next(trainer.batches(0)), None)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    differing = {name for name in gradients[0] if not torch.equal(gradients[0][name], gradients[1][name])}
    assert differing == {"word_embeddings.weight"}


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
