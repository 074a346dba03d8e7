# SPDX-License-Identifier: Apache-2.0
"""The game of tokenizer and discriminator: both learn, stop and go on, in 16 bits too."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import cogview.data.order
from cogview.config import ImageTokenizerConfig, ImageTokenizerTrainConfig, VQGANConfig, VQGANTrainConfig
from cogview.data.digits import DigitPairs
from cogview.tokens.vqgan import PIXELS, VQGAN
from cogview.training import vqgan
from cogview.training.discriminator import PatchDiscriminator, hinge_loss
from cogview.training.image_tokenizer import train_image_tokenizer
from cogview.training.vqgan import VQGANTrainer
from tests.model.helpers import die_in_step

SHAPE = ImageTokenizerConfig(
    num_codes=16,
    code_dim=8,
    channels=8,
    stages=2,
    image_size=16,
    pixel_mean=PIXELS,
    pixel_std=PIXELS,
    vqgan=VQGANConfig((1, 1, 2), residual_blocks=1, attention_levels=(2,), latent_channels=8),
)
GAME = VQGANTrainConfig(
    perceptual=0.0, discriminator_start=4, discriminator_channels=8, discriminator_layers=1
)
CONFIG = ImageTokenizerTrainConfig(
    steps=9, batch_size=8, learning_rate=2e-3, checkpoint_every=3, warmup_steps=1, vqgan=GAME
)


def tokenizer(seed=0):
    torch.manual_seed(seed)
    return VQGAN(SHAPE)


def changed(**game):
    return dataclasses.replace(CONFIG, vqgan=dataclasses.replace(GAME, **game))


def test_training_learns(tmp_path):
    images = torch.stack([DigitPairs("test").image(index, 16) for index in range(32)])
    model = tokenizer().eval()

    def error():
        return torch.nn.functional.mse_loss(model.decode(model.encode(images)), images).item()

    untrained = error()
    config = dataclasses.replace(changed(discriminator_start=30), steps=45, checkpoint_every=45)
    history = train_image_tokenizer(model.train(), DigitPairs(), config, tmp_path, progress=False)
    model.eval()
    assert error() < 0.7 * untrained  # with ten seeds 0.28 to 0.39
    assert len(model.encode(images).unique()) > 8  # of 16; with ten seeds 15 or 16
    assert not any(history["discriminator"][:30]) and all(history["discriminator"][30:])
    assert all(weight > 0 for weight in history["adaptive_weight"][30:])


def test_the_discriminator_learns_to_tell_stripes_across_from_stripes_down():
    trainer = VQGANTrainer(tokenizer(), DigitPairs(), changed(discriminator_start=0))
    across = (torch.arange(16) // 2 % 2).float().expand(8, 3, 16, 16)
    losses = [trainer._tell_apart(across, across.mT).loss.item() for _ in range(25)]
    assert losses[0] > 0.8 and losses[-1] < 0.4  # with ten seeds above 0.94, and below 0.03


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, precision):
    codebook = "straight-through" if precision == "bf16" else "moving-average"
    config = dataclasses.replace(CONFIG, precision=precision, batch_size=4, codebook=codebook)
    uncut = tokenizer()
    whole = train_image_tokenizer(uncut, DigitPairs(), config, tmp_path / "whole", progress=False)
    assert all(torch.isfinite(torch.tensor(values)).all() for values in whole.values())
    die_in_step(7, monkeypatch, cogview.data.order)
    with pytest.raises(RuntimeError, match="killed"):
        train_image_tokenizer(tokenizer(), DigitPairs(), config, tmp_path / "cut", progress=False)
    monkeypatch.undo()
    other = tokenizer(seed=9)
    assert train_image_tokenizer(other, DigitPairs(), config, tmp_path / "cut", progress=False) == whole
    states = uncut.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_step_with_nan_moves_neither_player(tmp_path, monkeypatch):
    trainer = VQGANTrainer(tokenizer(), DigitPairs(), changed(discriminator_start=0))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    monkeypatch.setattr(vqgan, "hinge_loss", lambda real, rebuilt: real.sum() * float("nan"))
    monkeypatch.setattr(vqgan.F, "l1_loss", lambda a, b: a.sum() * float("nan"))
    result = trainer.step(3, torch.rand(4, 3, 16, 16))
    assert bool(result.descent.skipped)
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer():
    trainer = VQGANTrainer(tokenizer(), DigitPairs(), CONFIG)
    images = torch.rand(4, 3, 16, 16)
    rebuilt = trainer.tokenizer(images).images
    told = torch.nn.functional.l1_loss(rebuilt, images)
    fooling, weight = trainer._fool(rebuilt, told)
    weights = trainer.tokenizer.decoder.conv_out.weight
    pulls = [torch.autograd.grad(x, weights, retain_graph=True)[0].norm() for x in (told, fooling)]
    torch.testing.assert_close(weight, pulls[0] / (pulls[1] + 1e-4))
    assert not any(parameter.grad is not None for parameter in trainer.discriminator.parameters())


def test_mean_colours_count_where_they_are_asked_for(monkeypatch):
    images, losses = torch.rand(4, 3, 16, 16), []
    for weight in (0.0, 2.0):
        trainer = VQGANTrainer(tokenizer(), DigitPairs(), dataclasses.replace(CONFIG, color_weight=weight))
        monkeypatch.setattr(trainer, "color_error", lambda rebuilt, images: rebuilt.sum() * 0 + 0.5)
        losses.append(float(trainer.step(0, images).descent.loss))
    assert losses[1] - losses[0] == pytest.approx(1.0, abs=1e-5)


def test_hinge_loss_by_hand():
    real, rebuilt = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.5])
    assert hinge_loss(real, rebuilt).item() == pytest.approx(0.5 * (0.25 + 0.75))
    assert PatchDiscriminator(8, 3)(torch.rand(2, 3, 32, 32)).shape == (2, 1, 2, 2)


def test_pictures_too_small_for_the_discriminator_are_refused():
    with pytest.raises(ValueError, match="image_size must be at least 24 for a discriminator of 3 layers"):
        VQGANTrainer(tokenizer(), DigitPairs(), changed(discriminator_layers=3))
