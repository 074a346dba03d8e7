# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from cogview.data.rows import CaptionLengths
from cogview.presets import PRESETS, implied_preset
from cogview.settings import TOKENIZER_SETTINGS, TokenizerSettings, write_settings
from cogview.tokens.sequence import FRAME_TOKENS
from cogview.tokens.vocab import Vocab
from cogview.training.plan import plan_model, plan_text, require_fitting_preset

SMALL = PRESETS["small"]
ENGLISH = [f"a photo of thing number {index}" for index in range(200)]
CHINESE = [f"一张第{index}号东西的照片，天空是蓝色的" for index in range(200)]


@pytest.mark.parametrize(
    "captions", [ENGLISH + CHINESE, ENGLISH, ["a cat", "a dog", "cat", "dog", "一只猫"], ["x"], ["😀"] * 3]
)
def test_the_text_vocabulary_shrinks_to_what_the_captions_support_and_says_so(captions):
    plan = plan_text(captions, 4000)
    assert len(plan.tokenizer) < 4000
    assert not any(plan.tokenizer.unknown_pieces(caption) for caption in captions)
    (note,) = plan.notes
    assert f"{len(plan.tokenizer)} pieces rather than 4000" in note
    assert f"{len(captions)} captions support no more" in note


def test_the_text_vocabulary_grows_to_hold_every_character_and_says_so():
    plan = plan_text(CHINESE, 10)
    assert not any(plan.tokenizer.unknown_pieces(caption) for caption in CHINESE)
    assert f"{len(plan.tokenizer)} pieces rather than 10" in plan.notes[0]
    assert "different characters" in plan.notes[0]


def test_a_vocabulary_of_the_size_asked_for_needs_no_note():
    plan = plan_text(ENGLISH, 40)
    assert len(plan.tokenizer) == 40
    assert plan.notes == ()


def captions(*lengths, with_unknown=0):
    counted = CaptionLengths()
    counted.add(lengths, with_unknown)
    return counted


@pytest.mark.parametrize(("longest", "room"), [(3, 30), (30, 30), (50, 50), (500, 120)])
def test_the_room_for_text_follows_from_the_captions(longest, room):
    plan = plan_model(SMALL, Vocab(512, 300), 64, captions(2, longest))
    assert plan.max_text_tokens == room
    assert plan.config.max_positions == FRAME_TOKENS + room + 64
    assert plan.config.vocab_size == Vocab(512, 300).padded_size
    assert any("1 of 2 captions are longer than 120 tokens" in note for note in plan.notes) == (longest > 120)


def test_more_text_takes_no_pivots_from_the_picture():
    digits = PRESETS["digits"]
    pivots = {
        longest: plan_model(digits, Vocab(48, 130), 16, captions(longest)).config.three_region.num_pivots
        for longest in (3, 5, 8)
    }
    assert pivots == {3: 16, 5: 16, 8: 19}


def test_characters_that_the_tokenizer_does_not_know_are_told():
    plan = plan_model(SMALL, Vocab(512, 300), 64, captions(2, 1, 1, with_unknown=1))
    assert "1 of 3 captions have characters that the run's text tokenizer does not know" in plan.notes[0]


def folder_of(tmp_path, preset, name):
    settings = TokenizerSettings("photos", 99, preset.image_tokenizer, preset.image_tokenizer_train, name)
    write_settings(tmp_path / TOKENIZER_SETTINGS, settings)
    return settings


@pytest.mark.parametrize(
    ("trained", "recorded", "implied"),
    [
        ("base", "base", "base"),
        ("base", "", "tutorial"),
        ("digits", "", "digits"),
        ("small", "gone", "small"),
    ],
)
def test_the_tokenizers_of_a_folder_imply_the_preset(tmp_path, trained, recorded, implied):
    folder_of(tmp_path, PRESETS[trained], recorded)
    preset = implied_preset(tmp_path)
    assert preset.name == implied
    assert preset.model == PRESETS[implied].model
    assert preset.text_pieces == 99


def test_sizes_changed_by_hand_stay_and_fit(tmp_path):
    shape = dataclasses.replace(SMALL.image_tokenizer, image_size=32)
    settings = folder_of(tmp_path, dataclasses.replace(SMALL, image_tokenizer=shape), "small")
    preset = implied_preset(tmp_path)
    assert preset.image_tokenizer == shape
    assert require_fitting_preset(tmp_path, preset) == settings


def test_a_preset_for_other_pictures_is_refused(tmp_path):
    folder_of(tmp_path, PRESETS["digits"], "digits")
    with pytest.raises(ValueError) as raised:
        require_fitting_preset(tmp_path, PRESETS["tutorial"])
    message = str(raised.value)
    assert "take pictures of 16 px as 4 x 4 codes of 48" in message
    assert "preset 'tutorial' is made for 256 px as 32 x 32 codes of 8192" in message
    assert "leave --preset out" in message
    require_fitting_preset(tmp_path, PRESETS["digits"])
