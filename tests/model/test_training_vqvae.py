# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch

import cogview.data.order
import cogview.training.vqvae
from cogview.config import ImageTokenizerConfig, ImageTokenizerTrainConfig
from cogview.data.digits import DigitPairs
from cogview.tokens.vqvae import ImageTokenizer, Quantizer
from cogview.training.image_tokenizer import train_image_tokenizer
from tests.model.helpers import die_in_step

SHAPE = ImageTokenizerConfig(
    num_codes=16,
    code_dim=8,
    channels=16,
    stages=2,
    image_size=16,
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
)
CONFIG = ImageTokenizerTrainConfig(steps=9, batch_size=8, learning_rate=3e-3, checkpoint_every=3)


def tokenizer(seed=0):
    torch.manual_seed(seed)
    return ImageTokenizer(SHAPE)


def test_training_learns(tmp_path):
    config = dataclasses.replace(CONFIG, steps=100, batch_size=16)
    history = train_image_tokenizer(tokenizer(), DigitPairs(), config, tmp_path, progress=False)
    assert sum(history["reconstruction"][-5:]) < 0.7 * sum(history["reconstruction"][:5])
    assert history["codes_used"][-1] > 8


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_killed_run_resumes_to_the_same_losses(tmp_path, monkeypatch, precision):
    config = dataclasses.replace(CONFIG, precision=precision)
    whole = train_image_tokenizer(tokenizer(), DigitPairs(), config, tmp_path / "whole", progress=False)
    assert all(torch.isfinite(torch.tensor(values)).all() for values in whole.values())
    die_in_step(7, monkeypatch, cogview.data.order)
    with pytest.raises(RuntimeError, match="killed"):
        train_image_tokenizer(tokenizer(), DigitPairs(), config, tmp_path / "cut", progress=False)
    monkeypatch.undo()
    other = tokenizer(seed=9)
    assert train_image_tokenizer(other, DigitPairs(), config, tmp_path / "cut", progress=False) == whole


def test_activations_are_in_the_precision_and_weights_in_float32(tmp_path):
    """The same errors of the first step up to the rounding of bfloat16, which is there."""
    found = {}
    for precision in ("fp32", "bf16"):
        config, model = dataclasses.replace(CONFIG, steps=1, precision=precision), tokenizer()
        history = train_image_tokenizer(model, DigitPairs(), config, tmp_path / precision, progress=False)
        found[precision] = history["reconstruction"][0]
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert found["bf16"] != found["fp32"] and found["bf16"] == pytest.approx(found["fp32"], rel=0.02)


def test_a_step_with_nan_changes_nothing(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, steps=1)
    model = tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(cogview.training.vqvae.F, "mse_loss", lambda a, b: a.sum() * float("nan"))
    train_image_tokenizer(model, DigitPairs(), config, tmp_path, progress=False)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("codebook", ["straight-through", "gumbel", "fixed"])
def test_every_way_to_a_codebook_learns_and_resumes(tmp_path, codebook):
    config = dataclasses.replace(CONFIG, steps=90, checkpoint_every=90, codebook=codebook, color_weight=1.0)
    model = tokenizer()
    start = model.quantize_t.embed.detach().clone()
    history = train_image_tokenizer(model, DigitPairs(), config, tmp_path, progress=False)
    assert sum(history["reconstruction"][-5:]) < 0.8 * sum(history["reconstruction"][:5])
    assert torch.equal(model.quantize_t.embed, start) == (codebook == "fixed")
    other = tokenizer(seed=9)
    assert train_image_tokenizer(other, DigitPairs(), config, tmp_path, progress=False) == history
    assert torch.equal(other.quantize_t.embed, model.quantize_t.embed)


def test_the_temperature_falls_to_its_last_value_at_half_of_the_training():
    found = [cogview.training.vqvae.temperature(done) for done in (0, 0.25, 0.5, 0.9)]
    assert found == pytest.approx([1, 0.25, 1 / 16, 1 / 16])


def test_the_book_begins_where_the_encoder_is_after_the_warm_up(tmp_path, monkeypatch):
    begun = []
    real = Quantizer.begin_at
    monkeypatch.setattr(Quantizer, "begin_at", lambda self, z: (begun.append(z.shape), real(self, z)))
    config = dataclasses.replace(CONFIG, warmup_steps=5)
    model = tokenizer()
    start = model.quantize_t.embed.detach().clone()
    train_image_tokenizer(model, DigitPairs(), dataclasses.replace(config, steps=5), tmp_path, progress=False)
    assert torch.equal(model.quantize_t.embed, start) and not begun
    train_image_tokenizer(tokenizer(), DigitPairs(), config, tmp_path, progress=False)  # It goes on.
    assert begun == [(8, 4, 4, 8)]
