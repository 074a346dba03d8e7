# SPDX-License-Identifier: Apache-2.0
"""Finetuning: what begins with a run's weights, what stays, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from cogview.cli import main
from cogview.config import TrainConfig
from cogview.run import load_run
from cogview.settings import MODEL_SETTINGS, load_model_settings, write_settings
from cogview.training.checkpoint import CHECKPOINTS, latest_checkpoint
from cogview.training.finetune import TASKS, Finetune, finetune_captioning, finetune_style, preset_of
from tests.model.helpers import save_photos

QUIET = {"device": "cpu", "progress": False}
FEW = {"steps": 2, "batch_size": 4, "checkpoint_every": 1}


def weights_of(folder):
    return load_run(folder, "cpu").model.state_dict()


def largest_change(folder, other):
    before, after = weights_of(folder), weights_of(other)
    return max((after[name] - before[name]).abs().max().item() for name in before)


def test_a_captioner_begins_with_the_weights_of_the_run_and_learns_captions(run_folder, photos, tmp_path):
    out = tmp_path / "captioner"
    history = finetune_captioning(Finetune(run_folder, photos, out, FEW, **QUIET))
    assert len(history["text_loss"]) == 2
    # AdamW moves a weight by about its rate, so two steps stay near where they began.
    rate = load_model_settings(out).train.learning_rate
    assert rate == pytest.approx(0.3 * load_model_settings(run_folder).train.learning_rate)
    assert 0 < largest_change(run_folder, out) < 4 * rate
    settings = load_model_settings(out)
    assert settings.train.caption_fraction == 1
    assert settings.finetuned.task == "captioning"
    assert settings.model == load_model_settings(run_folder).model
    assert isinstance(load_run(out, "cpu").caption(photos / "0.png"), str)


def test_a_finetuning_that_was_interrupted_goes_on_to_the_same_weights(run_folder, photos, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finetune_captioning(Finetune(run_folder, photos, whole, FEW, **QUIET))
    finetune_captioning(Finetune(run_folder, photos, parts, FEW, **QUIET))
    shutil.rmtree(latest_checkpoint(parts / CHECKPOINTS))  # as a kill after the first step leaves it
    assert latest_checkpoint(parts / CHECKPOINTS).name == "step-00000001"
    finetune_captioning(Finetune(run_folder, photos, parts, FEW, **QUIET))
    assert largest_change(whole, parts) == 0


def test_a_style_needs_pictures_alone_and_gives_them_all_one_caption(run_folder, photos, tmp_path):
    (photos / "captions.tsv").write_text("nothing of use")
    out = tmp_path / "style"
    caption = "a handwritten seven"
    finetune_style(Finetune(run_folder, photos, out, FEW, caption=caption, **QUIET))
    settings = load_model_settings(out)
    assert settings.train.caption_fraction == 0
    assert settings.finetuned.caption == caption
    run = load_run(out, "cpu")
    rows = torch.frombuffer(bytearray((out / "rows" / "rows.bin").read_bytes()), dtype=torch.int32)
    rows = rows.view(6, -1)[:, : run.max_text_tokens]
    texts = {tuple(row[row >= 0].tolist()) for row in rows}
    assert texts == {tuple(run.tokenizers.vocab.text_start + piece for piece in run.pieces(caption))}


def test_a_converted_run_needs_no_optimizer_and_keeps_its_length_of_captions(run_folder, photos, tmp_path):
    converted = tmp_path / "converted"
    shutil.copytree(run_folder, converted)
    checkpoint = latest_checkpoint(converted / CHECKPOINTS)
    (checkpoint / "optimizer.safetensors").unlink()
    settings = dataclasses.replace(load_model_settings(converted), caption_tokens=4, train=TrainConfig())
    write_settings(converted / MODEL_SETTINGS, settings)
    style, captioner = tmp_path / "style", tmp_path / "captioner"
    finetune_style(Finetune(converted, photos, style, FEW, caption="seven", **QUIET))
    finetune_captioning(Finetune(converted, photos, captioner, FEW, **QUIET))
    assert load_run(style, "cpu").caption_tokens == 4  # It has seen no caption's end.
    assert load_run(captioner, "cpu").caption_tokens is None


def test_dense_attention_while_finetuning_leaves_the_shape_of_the_weights(run_folder, photos, tmp_path):
    out = tmp_path / "dense"
    finetune_captioning(Finetune(run_folder, photos, out, FEW, attention="dense", **QUIET))
    assert load_model_settings(run_folder).model.three_region is not None
    assert load_model_settings(out).model.three_region is None


def test_what_cannot_be_finetuned_is_told_and_writes_nothing(run_folder, photos, tmp_path, capsys):
    def refused(*words):
        code = main(["finetune", *map(str, words), "--device", "cpu"])
        said = capsys.readouterr().err
        assert code == 2
        assert len(said.splitlines()) == 1
        return said

    out = tmp_path / "out"
    ends = ("--data", photos, "--out", out, "--steps", "1", "--batch-size", "2")
    assert "run folder not found" in refused("captioning", "--run", tmp_path / "none", *ends)
    assert "another folder than run" in refused(
        "captioning", "--run", run_folder, "--data", photos, "--out", run_folder
    )
    assert "--caption belongs to the task style" in refused(
        "captioning", "--run", run_folder, *ends, "--caption", "x"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no pictures" in refused("style", "--run", run_folder, "--data", empty, "--out", out)
    assert not out.exists()


def test_a_finetuned_folder_is_not_gone_on_with_as_something_else(run_folder, photos, tmp_path):
    out = tmp_path / "captioner"
    finetune_captioning(Finetune(run_folder, photos, out, FEW, **QUIET))
    with pytest.raises(ValueError, match="was started with"):
        finetune_style(Finetune(run_folder, photos, out, FEW, **QUIET))
    changed = tmp_path / "changed"
    save_photos(changed)
    moved = tmp_path / "moved"
    shutil.copytree(run_folder, moved)
    finetune_captioning(Finetune(moved, photos, out, FEW, **QUIET))  # The same weights in another place.
    other = latest_checkpoint(moved / CHECKPOINTS)
    before = sorted((moved / CHECKPOINTS).iterdir())[0]
    assert before != other
    shutil.rmtree(other)
    with pytest.raises(ValueError, match="was finetuned from has other weights now"):
        finetune_captioning(Finetune(moved, photos, out, FEW, **QUIET))


def test_every_task_is_a_choice_of_the_command():
    from typing import get_args, get_type_hints

    from cogview.options import Finetune as Options

    assert set(get_args(get_type_hints(Options)["task"])) == set(TASKS)


def changed(run_folder, to, **parts):
    """A copy of a run with other settings: of each part, such as ``train``, the fields that differ."""
    shutil.copytree(run_folder, to)
    settings = load_model_settings(to)
    other = {name: dataclasses.replace(getattr(settings, name), **fields) for name, fields in parts.items()}
    write_settings(to / MODEL_SETTINGS, dataclasses.replace(settings, **other))
    return to


def test_a_finetuning_hides_no_codes_unless_asked(run_folder, tmp_path):
    """Of a picture that is to be described, it would hide what the task is about."""
    hiding = changed(run_folder, tmp_path / "hiding", train={"code_dropout": 0.5})
    assert preset_of("captioning", Finetune(hiding, "digits", tmp_path / "out")).train.code_dropout == 0
    asked = Finetune(hiding, "digits", tmp_path / "out", {"code_dropout": 0.2})
    assert preset_of("captioning", asked).train.code_dropout == 0.2


def test_guidance_stays_where_text_is_what_is_drawn(run_folder, tmp_path):
    given = Finetune(
        changed(run_folder, tmp_path / "guided", sampling={"guidance": 2.0}), "digits", tmp_path / "out"
    )
    kept = {task: preset_of(task, given).sampling.guidance for task in ("style", "super-resolution")}
    assert kept == {"style": 2.0, "super-resolution": 1.0}
