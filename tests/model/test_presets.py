# SPDX-License-Identifier: Apache-2.0
import pytest

from cogview.presets import PRESETS, get_preset
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
