# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest
import torch

from cogview.model.transformer import CogView
from cogview.presets import ABOUT, PRESETS, default_preset, get_preset
from cogview.tokens.sequence import FRAME_TOKENS
from cogview.tokens.vocab import Vocab


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_of_a_preset_fit_together(name):
    preset = PRESETS[name]
    vocab = Vocab(preset.image_tokenizer.num_codes, preset.text_pieces)
    assert preset.model.vocab_size == vocab.padded_size
    length = FRAME_TOKENS + preset.min_text_tokens + preset.image_tokenizer.codes_per_image
    assert preset.model.max_positions == length
    if preset.model.three_region is not None:
        # Every row's text must fit among the pivots, and random ones must be left.
        assert preset.model.three_region.num_pivots > preset.min_text_tokens + FRAME_TOKENS


def test_every_preset_knows_its_name_and_what_it_is_about():
    assert set(ABOUT) == set(PRESETS)
    assert all(preset.name == name for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", PRESETS)
def test_the_parameters_told_are_those_of_the_model(name):
    with torch.device("meta"):
        parameters = CogView(PRESETS[name].model).num_parameters()
    told = float(re.search(r"([\d.,]+) million parameters", ABOUT[name])[1].replace(",", ""))
    assert told == pytest.approx(parameters / 1e6, rel=0.06)


def test_the_default_preset_follows_from_the_data():
    assert default_preset("digits").name == "digits"
    assert default_preset("photos").name == default_preset(Path("photos")).name == "small"


def test_an_unknown_preset_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"unknown preset 'huge'; known presets: digits, emoji, emoji-64, small, card, tutorial, base",
    ):
        get_preset("huge")
