# SPDX-License-Identifier: Apache-2.0
"""The demo with next to no training: that it runs, resumes and reports, not how well it draws."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

import cogview.demo.run
from cogview.data.digits import TRAINING_PHRASINGS
from cogview.demo.digits import Demo, DemoSettings, run_demo
from cogview.demo.report import all_prompts, summary
from cogview.demo.run import DrawPlan, PhaseClock, draw_prompts
from cogview.files import read_json, save_tensors
from cogview.run import load_run
from cogview.settings import claim_settings, plain
from tests.model.helpers import tiny_preset


@pytest.fixture(scope="module")
def demo(tmp_path_factory, one_copy_of_each_digit):
    options = Demo(
        out=tmp_path_factory.mktemp("demo"),
        preset=tiny_preset(),
        num_candidates=3,
        draws=2,
        device="cpu",
        progress=False,
    )
    return options, run_demo(options)


def test_a_demo_of_before_a_setting_was_there_goes_on(tmp_path):
    settings = DemoSettings(0, 16, 4, tiny_preset())
    content = plain(settings)
    del content["preset"]["train"]["precision"]
    (tmp_path / "demo.json").write_text(json.dumps(content))
    claim_settings(tmp_path / "demo.json", settings)
    changed = dataclasses.replace(settings.preset.train, precision="bf16")
    other = dataclasses.replace(settings, preset=dataclasses.replace(settings.preset, train=changed))
    with pytest.raises(ValueError, match=r"started with preset\.train\.precision = 'fp32', now 'bf16'"):
        claim_settings(tmp_path / "demo.json", other)


def test_two_hundred_prompts_by_default_and_none_in_a_training_phrasing():
    prompts = all_prompts(Demo().draws)
    assert len(prompts) >= 200
    assert Demo().num_candidates == 16
    assert not {prompt.phrasing for prompt in prompts} & set(TRAINING_PHRASINGS)
    assert len({(prompt.text, prompt.draw) for prompt in prompts}) == len(prompts)


def test_report_and_pictures(demo):
    options, report = demo
    assert read_json(options.out / "report.json") == plain(report)
    assert report["results"]["prompts"] == 120
    assert len(report["prompts"]) == 120
    single = sum(prompt["right_candidates"] for prompt in report["prompts"]) / 360
    best = sum(prompt["best_shows"] == prompt["digit"] for prompt in report["prompts"]) / 120
    assert report["results"]["single_draw"] == pytest.approx(single)
    assert report["results"]["best_of_all"] == pytest.approx(best)
    assert report["judge"]["accuracy_on_real_test_scans"] > 0.98
    assert report["timings"]["starts"] == 1
    for name in ("contact_sheet.png", "loss_curves.png"):
        with Image.open(options.out / name) as picture:
            assert min(picture.size) > 300
    assert "best of 3 by CapLoss" in summary(report, options.out)


def test_a_finished_demo_is_not_done_again(demo, monkeypatch):
    options, report = demo

    def never(*arguments, **named):
        raise AssertionError("done again")

    for name in ("generate_codes", "rerank"):
        monkeypatch.setattr(cogview.demo.run, name, never)
    monkeypatch.setattr("cogview.training.pipeline.train_image_tokenizer", never)
    monkeypatch.setattr("cogview.training.transformer.losses_of", never)
    again = run_demo(options)
    assert again["results"] == report["results"]
    assert again["prompts"] == report["prompts"]
    assert again["timings"]["starts"] == 2


@pytest.mark.parametrize(
    "phase",
    ["cogview.training.transformer.losses_of", "cogview.demo.run.generate_codes", "cogview.demo.run.rerank"],
)
def test_interrupted_in_any_phase_it_goes_on_to_the_same_result(demo, tmp_path, monkeypatch, phase):
    finished, report = demo
    options = dataclasses.replace(finished, out=tmp_path)

    def interrupt(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(phase, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(options)
    monkeypatch.undo()
    resumed = run_demo(options)
    assert resumed["prompts"] == report["prompts"]
    assert resumed["timings"]["starts"] == 2


@pytest.mark.parametrize("content", ["[]", "{}", '{"seconds": []}', '{"starts": "1"}', '{"more": 1}', "null"])
def test_a_damaged_file_of_timings_is_one_clear_error(tmp_path, content):
    path = tmp_path / "timings.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"timings\.json is damaged: .*; remove it$"):
        PhaseClock(path)


def test_a_draw_that_holds_something_else_is_one_clear_error(demo, tmp_path):
    options, _ = demo
    run = load_run(options.out, "cpu")
    for saved in ({}, {"codes": torch.zeros(1, 3, 16), "losses": torch.zeros(1, 2)}):
        save_tensors(tmp_path / "draws" / "draw-0.safetensors", saved)
        with pytest.raises(ValueError, match=r"draw-0\.safetensors is damaged: .*; remove it$"):
            draw_prompts(DrawPlan(tmp_path, 0, 3, False), run, all_prompts(1)[:1])


def test_another_seed_in_the_same_folder_is_an_error(demo):
    options, _ = demo
    with pytest.raises(ValueError, match=r"was started with seed = 0, now 1"):
        run_demo(dataclasses.replace(options, seed=1))
