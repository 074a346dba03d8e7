# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest

from cogview.config import (
    ImageTokenizerConfig,
    ImageTokenizerTrainConfig,
    ModelConfig,
    Preset,
    TrainConfig,
)
from cogview.presets import PRESETS
from cogview.settings import (
    MAY_CHANGE,
    MODEL_SETTINGS,
    TOKENIZER_SETTINGS,
    Finetuned,
    ModelSettings,
    TokenizerSettings,
    _flat,
    build,
    check_settings,
    claim_settings,
    load_model_settings,
    load_tokenizer_settings,
    plain,
    write_settings,
)
from cogview.training.clip_gen import ClipGenSettings


def tokenizer_settings(name="digits"):
    preset = PRESETS[name]
    return TokenizerSettings(
        "digits", preset.text_pieces, preset.image_tokenizer, preset.image_tokenizer_train, name
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    content = json.loads(json.dumps(plain(PRESETS[name])))
    assert build(Preset, content) == PRESETS[name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "missing"),
        ({"model": {"num_layers": 1}}, "missing"),
        ({"model": 3}, "must be a table"),
        ({"nonsense": 1}, "no field 'nonsense'"),
        ([], "must be a table"),
    ],
)
def test_content_that_is_no_preset_is_an_error(content, message):
    with pytest.raises(TypeError, match=message):
        build(Preset, content)


def test_settings_are_written_and_read_back(tmp_path):
    settings = tokenizer_settings()
    write_settings(tmp_path / TOKENIZER_SETTINGS, settings)
    assert load_tokenizer_settings(str(tmp_path)) == settings
    preset = PRESETS["digits"]
    model = ModelSettings("digits", preset.model, preset.sampling, 5, preset.train)
    write_settings(tmp_path / MODEL_SETTINGS, model)
    assert load_model_settings(tmp_path) == model


def test_the_first_difference_is_named(tmp_path):
    path, settings = tmp_path / TOKENIZER_SETTINGS, tokenizer_settings()
    check_settings(path, settings)
    assert not path.exists()
    claim_settings(path, settings)
    claim_settings(path, settings)
    shape = dataclasses.replace(settings.image_tokenizer, num_codes=64)
    with pytest.raises(ValueError, match=r"started with image_tokenizer.num_codes = 48, now 64"):
        check_settings(path, dataclasses.replace(settings, image_tokenizer=shape))
    check_settings(path, dataclasses.replace(settings, preset="of another name"))
    claim_settings(tmp_path / "demo.json", {"seed": 0, "draws": (1, 2)})
    with pytest.raises(ValueError, match="seed = 0, now 1"):
        claim_settings(tmp_path / "demo.json", {"seed": 1, "draws": [1, 2]})


def test_how_a_run_is_computed_may_change_when_it_goes_on(tmp_path):
    preset = PRESETS["digits"]
    settings = ModelSettings("digits", preset.model, preset.sampling, 5, preset.train)
    claim_settings(tmp_path / MODEL_SETTINGS, settings)
    model = dataclasses.replace(preset.model, activation_checkpointing=True)
    train = dataclasses.replace(preset.train, accumulate=4, steps=9999, keep=7)
    check_settings(tmp_path / MODEL_SETTINGS, dataclasses.replace(settings, model=model, train=train))
    train = dataclasses.replace(train, precision="bf16")
    with pytest.raises(ValueError, match=r"started with train\.precision = 'fp32', now 'bf16'"):
        check_settings(tmp_path / MODEL_SETTINGS, dataclasses.replace(settings, train=train))


def test_the_list_of_what_may_change_names_settings_that_exist():
    preset = PRESETS["digits"]
    shape = ("digits", preset.model, preset.sampling, 5, preset.train)
    model = ModelSettings(*shape, finetuned=Finetuned("captioning", "runs/photos"))
    known = {field.name for field in dataclasses.fields(ClipGenSettings)}
    for settings in (tokenizer_settings(), model, preset):
        known |= set(_flat(plain(settings)))
    assert known >= MAY_CHANGE
    # This list is the only one: ``compare=False`` at a field frees nothing.
    for kind in (ModelConfig, TrainConfig, ImageTokenizerConfig, ImageTokenizerTrainConfig):
        assert all(field.compare for field in dataclasses.fields(kind))


def test_data_at_another_path_are_no_difference(tmp_path):
    settings = tokenizer_settings()
    claim_settings(tmp_path / TOKENIZER_SETTINGS, settings)
    check_settings(tmp_path / TOKENIZER_SETTINGS, dataclasses.replace(settings, data="/elsewhere"))


def test_fields_that_an_earlier_version_did_not_have_are_no_difference(tmp_path):
    settings = tokenizer_settings()
    content = plain(settings)
    del content["preset"], content["image_tokenizer_train"]["seed"]
    (tmp_path / TOKENIZER_SETTINGS).write_text(json.dumps(content))
    check_settings(tmp_path / TOKENIZER_SETTINGS, settings)
    assert load_tokenizer_settings(tmp_path).image_tokenizer_train.seed == 0


def test_what_is_missing_or_damaged_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="run folder not found"):
        load_model_settings(tmp_path / "absent")
    folder = tmp_path / "with a space"
    folder.mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no model\.json; .* cogview train --data DATA --out '.*with a space'"
    ):
        load_model_settings(folder)
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizers\.json; .* cogview train-tokenizer --data DATA --out"
    ):
        load_tokenizer_settings(folder)
    for damaged in ("[1]", "{}", '{"data": "x", "model": 3}'):
        (folder / "model.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"model\.json is damaged"):
            load_model_settings(folder)
    (folder / "tokenizers.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"tokenizers\.json is damaged, .*: missing in TokenizerSettings: \w+"
    ):
        load_tokenizer_settings(folder)
    (folder / "model.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model\.json is damaged: it must be a table of settings, got \[\]"):
        check_settings(folder / "model.json", {"num_layers": 3})


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        ("model", {"num_layers": 3.0}, "num_layers must be of type int, got 3.0"),
        ("model", {"num_layers": True}, "num_layers must be of type int, got True"),
        ("model", {"num_layers": 10_000_000}, "num_layers must be from 1 to 1,000, got 10000000"),
        ("model", {"pb_relax": "max"}, "pb_relax must be of type"),
        ("train", {"betas": [0.9]}, "betas must be of type"),
        ("train", {"betas": [0.9, "x"]}, "betas must be of type"),
        ("train", {"learning_rate": "fast"}, "learning_rate must be of type float, got 'fast'"),
        ("train", {"lion": 1}, "TrainConfig has no field 'lion'; a newer version of cogview may have"),
        (None, {"max_text_tokens": None}, "max_text_tokens must be of type int, got None"),
        (None, {"format_version": 3}, "written by a newer version of cogview"),
    ],
)
def test_settings_of_a_wrong_type_or_of_a_newer_version_are_one_clear_error(
    tmp_path, table, changes, message
):
    preset = PRESETS["digits"]
    write_settings(
        tmp_path / MODEL_SETTINGS, ModelSettings("digits", preset.model, preset.sampling, 5, preset.train)
    )
    content = json.loads((tmp_path / MODEL_SETTINGS).read_text())
    (content[table] if table else content).update(changes)
    (tmp_path / MODEL_SETTINGS).write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        load_model_settings(tmp_path)
    assert "model.json is damaged, or of another version" in str(caught.value)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_of_two_long_lists_what_differs_is_told(tmp_path):
    path = tmp_path / "drawn.json"
    claim_settings(path, {"prompts": ["a", "b", "c"], "weights": "12"})
    with pytest.raises(ValueError, match=r"prompts\[1\] = 'b', now 'x'; repeat"):
        check_settings(path, {"prompts": ["a", "x", "c"], "weights": "12"})
    with pytest.raises(ValueError, match="with number of prompts = 3, now 2; repeat"):
        check_settings(path, {"prompts": ["a", "x"], "weights": "12"})
    with pytest.raises(ValueError, match="with --run = '12', now '34'; repeat"):
        check_settings(path, {"prompts": ["a", "b", "c"], "weights": "34"}, {"weights": "--run"})
