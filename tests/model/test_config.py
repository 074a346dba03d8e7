# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math

import pytest

from cogview.config import (
    ImageTokenizerConfig,
    ImageTokenizerTrainConfig,
    ModelConfig,
    SamplingConfig,
    ThreeRegionConfig,
    TrainConfig,
)
from cogview.presets import PRESETS
from cogview.training.clip_gen import TrainClipGen
from cogview.training.pipeline import TrainModel


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: ModelConfig(num_layers=0, hidden_size=8, num_heads=2), "num_layers"),
        (lambda: ModelConfig(num_layers=1, hidden_size=8, num_heads=3), "num_heads"),
        (lambda: ModelConfig(num_layers=1, hidden_size=8, num_heads=2, pb_relax="max"), "pb_relax"),
        (lambda: ImageTokenizerConfig(image_size=100), "image_size"),
        (lambda: TrainConfig(caption_fraction=1.5), "caption_fraction"),
        (lambda: TrainConfig(precision="int8"), "precision"),
        (lambda: TrainConfig(accumulate=0), "accumulate"),
        (lambda: TrainConfig(batch_size=4, accumulate=5), "accumulate"),
        (lambda: TrainConfig(log_every=0), "log_every"),
        (lambda: TrainConfig(embedding_gradient=0.0), "embedding_gradient"),
        (lambda: SamplingConfig(temperature=-0.1), "temperature"),
        (lambda: SamplingConfig(temperature=float("nan")), "temperature"),
        (lambda: TrainConfig(text_dropout=1.0), "text_dropout"),
        (lambda: TrainConfig(code_dropout=1.1), "code_dropout"),
        (lambda: SamplingConfig(top_p=2.0), "top_p"),
        # What PyTorch would only meet later, as a traceback, a model of NaN or no memory.
        (lambda: ModelConfig(num_layers=1, hidden_size=-64, num_heads=2), "hidden_size"),
        (lambda: ModelConfig(1, 8, 2, vocab_size=10**30), "vocab_size"),
        (lambda: ModelConfig(1, 8, 2, max_positions=0), "max_positions"),
        (lambda: ModelConfig(1, 8, 2, init_std=math.nan), "init_std"),
        (lambda: ThreeRegionConfig(block_size=0), "block_size"),
        (lambda: ImageTokenizerConfig(num_codes=-1), "num_codes"),
        (lambda: ImageTokenizerConfig(channels=10**9), "channels"),
        (lambda: ImageTokenizerConfig(stages=5000, image_size=2**5000), "stages"),
        (lambda: ImageTokenizerConfig(pixel_std=(1.0, 0.0, 1.0)), "pixel_std"),
        (lambda: ImageTokenizerTrainConfig(commitment=math.nan), "commitment"),
        (lambda: TrainConfig(steps=100_000_000), "steps must be from 1 to 99,999,999, got 100000000"),
        (lambda: TrainConfig(batch_size=10**11), "batch_size"),
        (lambda: TrainConfig(learning_rate=math.inf), "learning_rate"),
        (lambda: TrainConfig(betas=(0.9, math.nan)), "betas"),
        # Sums of what is weighed by it overflow in float32, and losses are then told as 0.
        (lambda: TrainConfig(text_weight=1e38), "text_weight must be finite, from 0 to 1,000,000,000"),
        (lambda: TrainConfig(learning_rate=1e39), "learning_rate must be finite, from 0 to 1,000,000,000"),
        (lambda: TrainConfig(clip_norm=-1.0), "clip_norm"),
        (lambda: TrainConfig(warmup_fraction=7.0), "warmup_fraction"),
        (lambda: TrainModel("x", "y", workers=99_999), "workers must be from 0 to 256, got 99999"),
        (lambda: TrainConfig(steps=1e4), "steps must be a whole number, got 10000.0"),
        (lambda: TrainConfig(accumulate=2.0), "accumulate must be a whole number"),
        (lambda: ThreeRegionConfig(num_pivots=64.0), "num_pivots must be a whole number"),
        (lambda: SamplingConfig(top_k=50.0), "top_k must be a whole number, 0 .off. or more, got 50.0"),
        (lambda: SamplingConfig(guidance=1e300), "guidance"),
        (lambda: SamplingConfig(guidance=math.nan), "guidance must be from 0 to 1,000"),
        (
            lambda: TrainClipGen("x", "y", "z", PRESETS["digits"].model, sampling=SamplingConfig(guidance=2)),
            "guidance",
        ),
    ],
)
def test_a_bad_value_is_an_error_that_names_it(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["base"].model.num_layers = 3
