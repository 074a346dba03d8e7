# SPDX-License-Identifier: Apache-2.0
"""Nothing in training depends on ``torch.set_default_dtype``: the same bits under any of them.

Training of VQGAN, CLIP and CLIP-GEN too, and what the frozen networks see.
"""

import contextlib
import dataclasses

import pytest
import torch

from cogview.config import ClipTrainConfig, ImageTokenizerConfig, ImageTokenizerTrainConfig, TrainConfig
from cogview.data.digits import DigitPairs
from cogview.data.enlargements import LocalDataset
from cogview.data.order import batch_indices
from cogview.data.rows import Rows
from cogview.data.tokens import TokenDataset
from cogview.perception.clip import Heads
from cogview.perception.efficientnet import EfficientNetLite0Features
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.clip import ClipTrainer, Features
from cogview.training.clip_gen import ClipGenTrainer, EncodedPictures, Judges
from cogview.training.image_tokenizer import train_image_tokenizer
from cogview.training.loop import run_loop
from cogview.training.transformer import train
from tests.model import test_clip, test_clip_gen, test_training_vqgan
from tests.model.helpers import SMALL, VOCAB, CogView


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trained_tokenizer(folder):
    torch.manual_seed(0)
    shape = ImageTokenizerConfig(num_codes=16, code_dim=8, channels=8, stages=2, image_size=16)
    tokenizer = ImageTokenizer(shape)
    config = ImageTokenizerTrainConfig(steps=4, batch_size=8, checkpoint_every=2)
    history = train_image_tokenizer(tokenizer, DigitPairs(), config, folder, progress=False)
    return tokenizer, history


def trained_model(folder, steps=4):
    torch.manual_seed(0)
    model = CogView(SMALL)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (20, 16), generator=generator)
    rows = Rows.in_memory(VOCAB, codes, [[[1 + index % 4, 7]] for index in range(20)])
    dataset = TokenDataset(VOCAB, rows, length=25)
    config = TrainConfig(steps=steps, batch_size=4, text_weight=1.1, checkpoint_every=2)
    return model, train(model, dataset, config, folder, progress=False)


def trained_vqgan(folder):
    tokenizer = test_training_vqgan.tokenizer()
    config = dataclasses.replace(test_training_vqgan.CONFIG, steps=6, batch_size=4)
    return tokenizer, train_image_tokenizer(tokenizer, DigitPairs(), config, folder, progress=False)


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def trained_clip(folder):
    torch.manual_seed(0)
    heads = Heads(test_clip.SHAPE)
    features = Features(drawn(8, 1280), drawn(16, 384), torch.arange(0, 17, 2))
    config = ClipTrainConfig(steps=4, batch_size=4, checkpoint_every=2)
    return heads, run_loop(ClipTrainer(heads, features, config), config, folder, progress=False)


def trained_clip_gen(folder):
    model, tokenizer = test_clip_gen.parts()
    pictures = EncodedPictures(torch.arange(96).view(6, 16) % 16, torch.nn.functional.normalize(drawn(6, 8)))
    config = dataclasses.replace(test_clip_gen.TRAIN, steps=4, checkpoint_every=2, embedding_noise=0.2)
    config = dataclasses.replace(config, embedding_loss=0.5)
    trainer = ClipGenTrainer(model, pictures, Judges(tokenizer, test_clip_gen.ColourClip()), config)
    return model, run_loop(trainer, config, folder, progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_frozen_network_sees_the_same_under_any_default_dtype(dtype):
    images = drawn(1, 3, 32, 32).sigmoid()
    expected = EfficientNetLite0Features(side=32)(images)
    with default_dtype(dtype):
        assert torch.equal(EfficientNetLite0Features(side=32)(images), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "trained", [trained_tokenizer, trained_vqgan, trained_clip, trained_clip_gen, trained_model]
)
def test_training_is_the_same_under_any_default_dtype(tmp_path, trained, dtype):
    expected, history = trained(tmp_path / "float32")
    with default_dtype(dtype):
        got, same_history = trained(tmp_path / "other")
        resumed, resumed_history = trained(tmp_path / "float32")
    assert same_history == resumed_history == history
    for name, tensor in expected.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, got.state_dict()[name]), name
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_codes_that_are_hidden_are_the_same_under_any_default_dtype(dtype):
    codes = torch.randint(0, 16, (6, 20), generator=torch.Generator().manual_seed(0))
    dataset = LocalDataset(VOCAB, Rows.in_memory(VOCAB, codes, [[[1, 7]]] * 6), length=30)

    def batch():
        return dataset.batch(3, 6, text_weight=1.0, caption_fraction=0.0, seed=1)

    expected = batch()
    with default_dtype(dtype):
        found = batch()
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.weight, expected.weight) and found.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_data_are_the_same_under_any_default_dtype(dtype):
    pairs = DigitPairs("test", copies=3)
    order = batch_indices(1, 2, 20, 30)
    with default_dtype(dtype):
        others = DigitPairs("test", copies=3)
        assert batch_indices(1, 2, 20, 30) == order
        for index in range(9):
            assert torch.equal(pairs.image(index, 16), others.image(index, 16))
