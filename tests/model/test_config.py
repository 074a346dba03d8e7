# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from cogview.config import ImageTokenizerConfig, ModelConfig, SamplingConfig, TrainConfig
from cogview.presets import PRESETS


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
        (lambda: SamplingConfig(top_p=2.0), "top_p"),
    ],
)
def test_a_bad_value_is_an_error_that_names_it(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["base"].model.num_layers = 3
