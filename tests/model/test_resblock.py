# SPDX-License-Identifier: Apache-2.0
"""A gradient scale for each residual block: no gradient is changed, lost to float16 or spoilt."""

import dataclasses

import pytest
import torch

from cogview.config import TrainConfig
from cogview.training.resblock import BACKOFF, GROWTH, INITIAL_SCALE, STEPS_BETWEEN_BACKOFFS, ResblockScaling
from cogview.training.transformer import TransformerTrainer, losses_of, train
from tests.model.helpers import small_model
from tests.model.test_precision import state_of
from tests.model.test_training_transformer import CONFIG, dataset

HALF = dataclasses.replace(CONFIG, precision="fp16", resblock_scaling=True)
BATCH = dataset().batch(0, 8, text_weight=1.0, caption_fraction=0.5, seed=0)


def gradients(dtype, *, scaling=True, loss_factor=1.0, spoil=None, **changes):
    """Of one batch with dense attention; the scaling, and how many blocks were dropped."""
    model = small_model(scale=5.0, three_region=None, **changes).train()
    resblocks = ResblockScaling(model)
    if spoil is not None:
        resblocks.scales[spoil] = 2.0**40
    dropped = 0
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        if scaling:
            with resblocks.scaled():
                (losses_of(model, BATCH, None, wide_head=True)[0] * loss_factor).backward()
            dropped = int(resblocks.unscale())
        else:
            (losses_of(model, BATCH, None, wide_head=True)[0] * loss_factor).backward()
    found = {name: parameter.grad / loss_factor for name, parameter in model.named_parameters()}
    return found, resblocks, dropped


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_float32_the_gradients_are_those_without_scales(checkpointing):
    plain, *_ = gradients(torch.float32, scaling=False)
    scaled, resblocks, dropped = gradients(torch.float32, activation_checkpointing=checkpointing)
    for name in plain:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-6, atol=1e-9, msg=name)
    assert dropped == 0
    torch.testing.assert_close(resblocks.scales, torch.full((4,), INITIAL_SCALE * GROWTH))


def error(found, exact):
    """Of the blocks' gradients, relative, the largest one."""
    names = [name for name in exact if ".dense" in name or "query_key_value" in name]
    return max(((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in names)


def test_in_float16_gradients_survive_that_would_be_lost():
    exact, *_ = gradients(torch.float32, scaling=False)
    tiny = 2.0**-14
    assert error(gradients(torch.float16, scaling=False, loss_factor=tiny)[0], exact) > 0.9
    for checkpointing in (False, True):
        found, _, dropped = gradients(torch.float16, loss_factor=tiny, activation_checkpointing=checkpointing)
        assert dropped == 0
        assert error(found, exact) < 0.02


def test_a_block_that_overflows_is_dropped_alone():
    whole, *_ = gradients(torch.float16)
    found, resblocks, dropped = gradients(torch.float16, spoil=2)
    assert dropped == 1
    spoilt = "transformer.layers.1.attention."
    for name, gradient in found.items():
        if name.startswith(spoilt):
            assert not gradient.any(), name
        elif name.startswith("transformer.layers.1.mlp") or ".layers.1.third" in name:
            torch.testing.assert_close(gradient, whole[name], msg=name)
        assert gradient.isfinite().all(), name
    assert found["transformer.layers.0.mlp.dense_h_to_4h.weight"].any()
    expected = torch.full((4,), INITIAL_SCALE * GROWTH)
    expected[2] = 2.0**24  # clamped
    torch.testing.assert_close(resblocks.scales, expected)


def test_a_scale_backs_off_once_in_a_window():
    model = small_model()
    resblocks = ResblockScaling(model)
    seen = []
    for _ in range(STEPS_BETWEEN_BACKOFFS + 2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.transformer.layers[0].mlp.dense_h_to_4h.bias.grad[3] = float("nan")
        assert resblocks.unscale() == 1
        seen.append(resblocks.scales[1].item())
    assert seen[0] == seen[STEPS_BETWEEN_BACKOFFS - 1] == pytest.approx(INITIAL_SCALE * BACKOFF)
    assert seen[STEPS_BETWEEN_BACKOFFS + 1] == pytest.approx(INITIAL_SCALE * BACKOFF**2)


def test_training_follows_float32_and_resumes_with_its_scales(tmp_path):
    steps = {"steps": 6, "checkpoint_every": 3}
    wide = train(
        small_model(), dataset(), dataclasses.replace(CONFIG, **steps), tmp_path / "wide", progress=False
    )
    config = dataclasses.replace(HALF, **steps)
    model = small_model()
    history = train(model, dataset(), config, tmp_path / "whole", progress=False)
    assert history["image_loss"] != wide["image_loss"]
    assert history["image_loss"] == pytest.approx(wide["image_loss"], rel=0.01)
    scales = state_of(tmp_path / "whole")["trainer"]["block_scales"]
    assert scales == pytest.approx([INITIAL_SCALE * GROWTH**6] * 4, rel=1e-5)
    for block in model.modules():
        assert not block._forward_hooks and not block._forward_pre_hooks

    real = TransformerTrainer.step

    class Dies(TransformerTrainer):
        def step(self, step, batch):
            if step == 4:
                raise RuntimeError("killed")
            return real(self, step, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(TransformerTrainer, "step", Dies.step)
        train(small_model(), dataset(), config, tmp_path / "cut", progress=False)
    assert train(small_model(seed=9), dataset(), config, tmp_path / "cut", progress=False) == history
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "whole")

    with pytest.raises(ValueError, match="must hold block_scales of 4 residual blocks to go on with"):
        train(small_model(), dataset(), config, tmp_path / "wide", progress=False)


def test_it_is_for_float16():
    with pytest.raises(ValueError, match="resblock_scaling must be False unless precision is fp16"):
        TrainConfig(resblock_scaling=True)
