# SPDX-License-Identifier: Apache-2.0
"""The models that race over a training step are one model: same losses, same gradients, same step."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import bench_training_step as bench
from benchmarks.rivals import training_step as plain
from cogview.training.transformer import losses_of

CPU = torch.device("cpu")
CASE = bench.cases(CPU, tiny=True)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["dense", "three regions"])
def test_both_models_have_the_same_loss_and_gradients(kind, checkpointing):
    model = dataclasses.replace(CASE.shape.model, activation_checkpointing=checkpointing)
    x = bench.make_inputs(dataclasses.replace(CASE, shape=dataclasses.replace(CASE.shape, model=model)), CPU)
    layouts = None if kind == "dense" else bench.layouts_of(x, CASE.shape.regions.config)
    losses = losses_of(x.model, x.batch, layouts)[0], plain.loss_of(x.model, x.batch, layouts)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(loss, list(x.model.parameters())) for loss in losses)
    for name, a, b in zip(dict(x.model.named_parameters()), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item(), msg=name)


def test_three_regions_are_not_dense_attention():
    x = bench.make_inputs(CASE, CPU)
    layouts = bench.layouts_of(x, CASE.shape.regions.config)
    dense, sparse = (plain.loss_of(x.model, x.batch, kind) for kind in (None, layouts))
    gradients = [torch.autograd.grad(loss, plain.first_gain(x.model))[0] for loss in (dense, sparse)]
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm()


@pytest.mark.parametrize(
    "variant",
    [v for v in bench.BENCHMARK.variants if v.name != "torch.compile"],
    ids=lambda variant: variant.name,
)
def test_every_step_starts_from_the_same_weights_and_does_all_of_its_work(variant):
    x = bench.make_inputs(CASE, CPU)
    before = [parameter.detach().clone() for parameter in x.model.parameters()]
    step = variant.prepare(x, CASE)
    first, second = step(), step()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(map(torch.equal, before, x.model.parameters()))
    state = [x.optimizer.state[parameter] for parameter in x.model.parameters()]
    assert all(values["step"] == 2 and values["exp_avg"].any() for values in state)
    assert all(parameter.grad is None for parameter in x.model.parameters())
