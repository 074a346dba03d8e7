# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from cogview.config import PRESETS, ImageTokenizerConfig, ModelConfig, SamplingConfig, TrainConfig, get_preset
from cogview.tokens.sequence import FRAME_TOKENS
from cogview.tokens.vocab import Vocab


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_of_a_preset_fit_together(name):
    preset = PRESETS[name]
    vocab = Vocab(preset.image_tokenizer.num_codes, preset.text_pieces)
    assert preset.model.vocab_size == vocab.padded_size
    length = FRAME_TOKENS + preset.max_text_tokens + preset.image_tokenizer.codes_per_image
    assert preset.model.max_positions == length
    if preset.model.three_region is not None:
        # Every row's text must fit among the pivots, and random ones must be left.
        assert preset.model.three_region.num_pivots > preset.max_text_tokens + FRAME_TOKENS


def test_an_unknown_preset_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown preset 'huge'; known presets: digits, tutorial, base, fashion"
    ):
        get_preset("huge")


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: ModelConfig(num_layers=0, hidden_size=8, num_heads=2), "num_layers"),
        (lambda: ModelConfig(num_layers=1, hidden_size=8, num_heads=3), "num_heads"),
        (lambda: ModelConfig(num_layers=1, hidden_size=8, num_heads=2, pb_relax="max"), "pb_relax"),
        (lambda: ImageTokenizerConfig(image_size=100), "image_size"),
        (lambda: TrainConfig(caption_fraction=1.5), "caption_fraction"),
        (lambda: SamplingConfig(temperature=0), "temperature"),
        (lambda: SamplingConfig(top_p=2.0), "top_p"),
    ],
)
def test_a_bad_value_is_an_error_that_names_it(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["base"].model.num_layers = 3
