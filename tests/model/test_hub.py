# SPDX-License-Identifier: Apache-2.0
"""``save_pretrained`` and ``from_pretrained`` on local folders."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from cogview import CogView
from cogview.config import ModelConfig, ThreeRegionConfig

CONFIG = ModelConfig(2, 32, 2, vocab_size=50, max_positions=20, three_region=ThreeRegionConfig(4, 2, 8))


@pytest.fixture
def model():
    return CogView(CONFIG)


def test_a_model_comes_back_as_it_was(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    before = torch.get_rng_state()
    loaded = CogView.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)  # no initial values are drawn to be thrown away
    assert loaded.config == CONFIG and not loaded.training
    assert all(weight.requires_grad and not weight.is_meta for weight in loaded.parameters())
    tokens = torch.randint(0, 50, (2, 9))
    assert torch.equal(loaded(tokens), model.eval()(tokens))


def test_half_precision_stays_so_in_the_file(model, tmp_path):
    model.half().save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    loaded = CogView.from_pretrained(tmp_path)
    weight = loaded.word_embeddings.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, model.word_embeddings.weight.float())


def test_settings_may_be_replaced(model, tmp_path):
    model.save_pretrained(tmp_path)
    dense = dataclasses.replace(CONFIG, three_region=None)
    assert CogView.from_pretrained(tmp_path, config=dense).config == dense


def test_what_does_not_belong_together_is_an_error(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; save_pretrained writes one"):
        CogView.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    deeper = dataclasses.replace(CONFIG, num_layers=3)
    with pytest.raises(ValueError, match="does not hold this model: 16 tensors missing"):
        CogView.from_pretrained(tmp_path, config=deeper)
    (tmp_path / "config.json").write_text(json.dumps({"num_layers": 2, "hidden_size": 32, "num_heads": 3}))
    with pytest.raises(ValueError, match="num_heads must be a divisor of hidden_size 32"):
        CogView.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_layers": 2}))
    with pytest.raises(TypeError, match="ModelConfig has no field 'hidden_layers'"):
        CogView.from_pretrained(tmp_path)
