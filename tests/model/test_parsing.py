# SPDX-License-Identifier: Apache-2.0
import dataclasses
import io
import os
import sys
from pathlib import Path

import pytest

from cogview.parsing import VERBS, parse
from cogview.presets import PRESETS
from cogview.settings import TOKENIZER_SETTINGS, TokenizerSettings, write_settings

TRAIN = ("--data", "photos", "--out", "runs/x", "--preset", "digits")
SMALL = PRESETS["small"]


def mistake(verb, *words):
    with pytest.raises(ValueError, match=f"see cogview {verb} --help$") as caught:
        parse(verb, words, "")
    message = str(caught.value)
    assert "\n" not in message and not set(message) & set("│─╭")
    return message


def test_a_training_verb_starts_from_its_preset():
    given = parse("train", TRAIN, "")
    preset = PRESETS["digits"]
    assert (given.data, given.out, given.preset) == ("photos", Path("runs/x"), "digits")
    assert (given.model, given.train, given.sampling) == (preset.model, preset.train, preset.sampling)
    given = parse("train-tokenizer", TRAIN, "")
    assert given.image_tokenizer == preset.image_tokenizer
    assert given.image_tokenizer_train == preset.image_tokenizer_train
    assert given.text_pieces == preset.text_pieces


def test_without_a_preset_the_data_choose():
    given = parse("train-tokenizer", ("--data", "digits", "--out", "x"), "")
    assert given.start == PRESETS["digits"] and given.image_tokenizer == PRESETS["digits"].image_tokenizer
    assert parse("train-tokenizer", ("--data=photos", "--out", "x"), "").start == SMALL


def test_train_starts_from_the_preset_of_the_tokenizers(tmp_path):
    shape = dataclasses.replace(SMALL.image_tokenizer, num_codes=64)
    settings = TokenizerSettings("photos", 99, shape, SMALL.image_tokenizer_train, "small")
    write_settings(tmp_path / TOKENIZER_SETTINGS, settings)
    given = parse("train", ("--data", "photos", "--out", str(tmp_path), "--model.num-layers", "3"), "")
    assert given.start.image_tokenizer == shape
    assert given.model == dataclasses.replace(SMALL.model, num_layers=3)
    # As in the train.toml of such a run.
    given = parse("train", ("--data", "photos", "--out", str(tmp_path), "--preset", "small"), "")
    assert given.start.image_tokenizer == shape
    with pytest.raises(FileNotFoundError, match="train the tokenizers first"):
        parse("train", ("--data", "photos", "--out", str(tmp_path / "absent")), "")


def test_a_terminal_of_one_column_gets_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit):
        parse("presets", ("--help",), "")
    assert "usage: cogview presets" in capsys.readouterr().out


def test_a_narrow_terminal_cuts_no_word_of_an_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit):
        parse("tokenize", ("--help",), "")
    assert '"{00..49}.tar"' in capsys.readouterr().out


def test_nested_options_override_the_preset():
    words = ("--model.num-layers", "6", "--train.learning-rate", "1e-3", "--train.betas", "0.8", "0.9")
    given = parse("train", (*TRAIN, *words, "--model.three-region.num-pivots=7"), "")
    assert given.model.num_layers == 6
    assert given.train.learning_rate == 1e-3
    assert given.train.betas == (0.8, 0.9)
    assert given.model.three_region.num_pivots == 7
    assert given.model.hidden_size == PRESETS["digits"].model.hidden_size


def test_the_last_one_counts():
    given = parse("train", (*TRAIN, "--preset", "tutorial", "--steps", "3", "--steps", "4"), "")
    assert given.start == PRESETS["tutorial"] and given.train.steps == 4


def test_short_forms_name_the_part_that_the_verb_trains():
    short = ("--steps", "3", "--batch-size=5", "--seed", "7")
    given = parse("train", (*TRAIN, *short), "").train
    assert (given.steps, given.batch_size, given.seed) == (3, 5, 7)
    assert parse("train", (*TRAIN, "--precision", "bf16"), "").train.precision == "bf16"
    assert parse("train", (*TRAIN, "--accumulate=4"), "").train.accumulate == 4
    assert "from 1 to batch_size" in mistake("train", *TRAIN, "--accumulate", "100000")
    base = (*TRAIN, "--preset", "base")
    assert parse("train", (*TRAIN, "--checkpoint-layers"), "").model.activation_checkpointing
    assert parse("train", base, "").model.activation_checkpointing
    assert not parse("train", (*base, "--no-checkpoint-layers"), "").model.activation_checkpointing
    assert "--accumulate" in mistake("train-tokenizer", *TRAIN, "--accumulate", "4")
    assert "--train.precision" in mistake("train", *TRAIN, "--precision", "int8")
    given = parse("train-tokenizer", (*TRAIN, *short, "--precision", "bf16"), "").image_tokenizer_train
    assert (given.steps, given.batch_size, given.seed, given.precision) == (3, 5, 7, "bf16")


def test_attention_switches_three_regions_on_and_off():
    assert parse("train", (*TRAIN, "--attention", "dense"), "").model.three_region is None
    words = ("--data", "x", "--out", "y", "--preset", "tutorial")
    assert parse("train", words, "").model.three_region is None
    on = parse("train", (*words, "--attention=three-region", "--model.three-region.block-size", "64"), "")
    assert on.model.three_region.block_size == 64


SETTINGS = """
preset = "digits"
data = "my photos"
[model]
num_layers = 6
activation_checkpointing = true
[model.three_region]
num_pivots = 9
density-correction = false
[train]
betas = [0.7, 0.8]
steps = 11
[image_tokenizer]
num_codes = 64
"""


def test_a_file_of_settings_serves_both_verbs_and_the_command_line_overrides_it(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(SETTINGS)
    words = ("--settings", str(path), "--out", "x", "--model.num-layers", "7", "--steps", "12")
    given = parse("train", words, "")
    assert (given.data, given.preset, given.settings) == ("my photos", "digits", path)
    assert (given.model.num_layers, given.model.activation_checkpointing) == (7, True)
    assert (given.model.three_region.num_pivots, given.model.three_region.density_correction) == (9, False)
    assert (given.train.betas, given.train.steps) == ((0.7, 0.8), 12)
    given = parse("train-tokenizer", ("--settings", str(path), "--out", "x"), "")
    assert given.image_tokenizer.num_codes == 64
    assert given.image_tokenizer_train.steps == PRESETS["digits"].image_tokenizer_train.steps


def test_a_bad_file_of_settings_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"settings file not found: .*absent\.toml"):
        parse("train", (*TRAIN, "--settings", str(tmp_path / "absent.toml")), "")
    with pytest.raises(OSError, match=r"--settings .* cannot be read: Is a directory; it takes a TOML file"):
        parse("train", (*TRAIN, "--settings", str(tmp_path)), "")
    path = tmp_path / "switch.toml"
    for content, reason in (
        ("help = true", "sets 'help', which is no option"),
        ('settings = "other.toml"', "sets 'settings', which is no option"),
        ('train.sample_texts = ["--help"]', "begins with --"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=reason):
            parse("train", (*TRAIN, "--settings", str(path)), "")
    path.write_bytes(b"\xef\xbb\xbfsteps = 7")  # The mark of an editor on Windows.
    assert parse("train", (*TRAIN, "--settings", str(path)), "").train.steps == 7
    path = tmp_path / "bad.toml"
    path.write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"bad\.toml is not valid TOML"):
        parse("train", (*TRAIN, "--settings", str(path)), "")
    path.write_text("[model]\nnum_layer = 3")
    assert "--model.num-layer" in mistake("train", *TRAIN, "--settings", str(path))


def test_mistakes_are_one_line_that_names_the_option():
    assert "unknown preset 'huge'" in _value_error("train", "--data", "x", "--out", "y", "--preset", "huge")
    assert mistake("train", "--data", "digits").startswith("missing: --out RUN run folder")
    assert mistake("train", *TRAIN, "--model.vocab-size", "9").startswith("--model.vocab-size follows from")
    assert mistake("train", *TRAIN, "--steps", "x").startswith(
        "--train.steps must be a whole number, got 'x'"
    )
    assert "--model.dropout must be a number, got 'x'" in mistake("train", *TRAIN, "--model.dropout", "x")
    assert "--model.num-heads must be a divisor" in mistake("train", *TRAIN, "--model.num-heads", "3")
    assert "--stps, 3; did you mean --steps; see" in mistake("train", *TRAIN, "--stps", "3")
    assert "did you mean" not in mistake("train", *TRAIN, "--modle.num-layers", "3")
    assert "Perhaps you meant: --top-k INT" in mistake("generate", "--run", "x", "a", "--tpo-k", "3")
    assert mistake("generate", "--run", "x").startswith("at least one TEXT is needed")
    assert mistake("caption", "--run", "x").startswith("at least one IMAGE is needed")
    assert mistake("generate", "--run", "x", "a", "--num", "0").startswith("--num must be at least 1, got 0")
    upper_half = ("infill", "--run", "x", "a", "photo.png", "--keep-top", "50")
    assert mistake(*upper_half).startswith(
        "--keep-top must be at least 0 and below 1 (0.5 is the upper half)"
    )
    assert "'dens'" in mistake("train", *TRAIN, "--attention", "dens")


def test_a_mistake_reads_the_same_where_the_output_takes_no_utf8(monkeypatch):
    words = ("evaluate", "x", "y", "--num", "0")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert mistake(*words) == "--num must be at least 1, got 0; see cogview evaluate --help"


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "a", "--num"),
        ("clip-generate", "a", "--run", "x", "--num"),
        ("evaluate", "x", "y", "--num"),
        ("rank-curve", "--run", "x", "--out", "y", "--candidates"),
        ("judge-clip-gen", "x", "--out", "y", "--candidates"),
    ],
    ids=lambda words: words[0],
)
def test_more_pictures_of_a_text_than_anybody_wants_are_refused_in_a_line_without_breaks(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    line = mistake(*words, str(10**50))
    assert line.startswith(f"{words[-1]} must be at most 100,000, got {10**50:,}; see")
    assert os.environ["COLUMNS"] == "60"


def _value_error(verb, *words):
    with pytest.raises(ValueError) as caught:
        parse(verb, words, "")
    return str(caught.value)


def test_generate_takes_texts_anywhere_and_negative_seeds():
    given = parse("generate", ("a seven", "--run", "r", "--seed", "-3", "--top-p=0.5"), "")
    assert (given.texts, given.run, given.seed, given.top_p) == (("a seven",), Path("r"), -3, 0.5)
    assert not given.no_rerank and parse("generate", ("a", "--run", "r", "--no-rerank"), "").no_rerank


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option(verb, capsys):
    with pytest.raises(SystemExit):
        parse(verb, ("--help",), "how it is called")
    shown = capsys.readouterr().out
    assert "how it is called" in shown
    assert "--no-no-" not in shown and "(default: None)" not in shown
