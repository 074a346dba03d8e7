# SPDX-License-Identifier: Apache-2.0
"""CLIP-GEN: learns from pictures without captions, draws for texts through the engine's cache."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

import cogview.training.clip_gen as training
from cogview import clip_gen_run
from cogview.cli import main
from cogview.clip_gen_run import ClipDrawing, load_clip_gen, ranked
from cogview.config import ClipGenTrainConfig, ModelConfig, SamplingConfig, ThreeRegionConfig
from cogview.data.digits import DigitPairs
from cogview.files import load_tensors, save_tensors
from cogview.generation.clip_gen import draw_from_embeddings
from cogview.generation.engine import GREEDY, DrawOptions
from cogview.model.clip_gen import ClipGen, clip_gen_config
from cogview.perception.clip import TransformersClip
from cogview.presets import PRESETS
from cogview.tokens.tokenizers import load_image_tokenizer
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.clip_gen import (
    ClipGenTrainer,
    EncodedPictures,
    Judges,
    TrainClipGen,
    noisy,
    run_loop,
    train_clip_gen,
)
from cogview.training.pipeline import TrainTokenizers, train_tokenizers
from tests.model.clips import save_tiny_clip
from tests.model.helpers import die_in_step, save_photos

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, dropout=0.1)
TRAIN = ClipGenTrainConfig(steps=6, batch_size=4, checkpoint_every=3)
DIGITS = PRESETS["digits"]
PRESET = dataclasses.replace(
    DIGITS,
    image_tokenizer=dataclasses.replace(DIGITS.image_tokenizer, channels=8, num_codes=16),
    image_tokenizer_train=dataclasses.replace(DIGITS.image_tokenizer_train, steps=8, batch_size=8),
)


class WithoutCaptions(DigitPairs):
    """Thirty scans whose captions nobody may ask for."""

    def __len__(self) -> int:
        return 30

    def captions(self, index: int) -> list[str]:
        raise AssertionError("a caption was read")

    def identity(self):
        yield self._scans[:30].numpy().tobytes()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of pictures without captions, a run with an image tokenizer alone, and a CLIP."""
    root = tmp_path_factory.mktemp("clip-gen")
    save_photos(root / "photos")
    (root / "photos" / "captions.tsv").unlink()
    options = TrainTokenizers(root / "photos", root / "run", PRESET, "cpu", progress=False, images_only=True)
    train_tokenizers(options)
    save_tiny_clip(root / "clip")
    return root


def run_at(folders, name):
    """A new run folder with the tokenizer."""
    out = folders / name
    out.mkdir()
    for file in ("tokenizers.json", "image_tokenizer.safetensors"):
        (out / file).write_bytes((folders / "run" / file).read_bytes())
    return out


def wanted(folders, out, **changes):
    config = dataclasses.replace(TRAIN, **changes)
    return TrainClipGen("digits", out, folders / "clip", MODEL, config, device="cpu", progress=False)


def test_the_tokenizer_needs_no_captions_either(folders):
    assert not (folders / "run" / "text_tokenizer.model").exists()
    assert (folders / "run" / "image_tokenizer.safetensors").exists()


def test_no_caption_is_read_and_texts_are_drawn(folders, monkeypatch):
    """Neither are the pictures asked for a caption in training, nor is CLIP given any text."""
    out = run_at(folders, "captionless")

    def read(clip, texts):
        raise AssertionError("a text was read")

    with monkeypatch.context() as patch:
        patch.setattr(TransformersClip, "of_texts", read)
        options = wanted(folders, out, embedding_noise=0.2, embedding_loss=0.5)
        history = train_clip_gen(options, WithoutCaptions())
    assert len(history["code_loss"]) == 6 and all(0 < loss < 3 for loss in history["embedding_loss"])
    run = load_clip_gen(out, "cpu")
    rows = run.generate(["a dog", "a cat"], num=3, sampling=SamplingConfig(), seed=1)
    assert [len(row) for row in rows] == [3, 3]
    for row in rows:
        cosines = [drawing.cosine for drawing in row]
        assert cosines == sorted(cosines, reverse=True)
    alone = run.generate("a cat", num=3, sampling=SamplingConfig(), seed=1)
    assert [d.image.tobytes() for d in alone] == [d.image.tobytes() for d in rows[1]]
    assert {drawing.text for drawing in alone} == {"a cat"}
    asked = []

    def draw(model, embeddings, num, options):
        asked.append(options.max_batch)
        return draw_from_embeddings(model, embeddings, num, options)

    with monkeypatch.context() as patch:
        patch.setattr(clip_gen_run, "rows_that_fit", lambda *_: 2)
        patch.setattr(clip_gen_run, "draw_from_embeddings", draw)
        run.generate("a cat", num=3)
    assert asked == [2]
    tokenizer = load_tensors(out / "image_tokenizer.safetensors")
    tokenizer["dec.blocks.0.bias"][0] = torch.nan
    damaged = folders / "damaged"
    shutil.copytree(out, damaged)
    save_tensors(damaged / "image_tokenizer.safetensors", tokenizer)
    with pytest.raises(ValueError, match=r"damaged: dec\.blocks\.0\.bias has numbers that are not"):
        load_image_tokenizer(damaged)
    for wrong, said in (
        ({"texts": "a cat", "rank": "CLIP"}, "rank must be one of clip, cap-loss, both, got 'CLIP'"),
        ({"texts": "a cat", "rank": "both"}, "rank both needs a captioner"),
        ({"texts": ["a cat", " "]}, "the text is empty"),
        ({"texts": "a \udcff"}, r"'a \\udcff' is not valid UTF-8"),
        ({"texts": "a cat", "num": 0}, "num must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            run.generate(**wrong)
    with pytest.raises(TypeError, match="texts must be a str or a list of str"):
        run.generate(3)


def test_from_a_folder_without_captions_by_the_command(folders, capsys):
    out = run_at(folders, "command")
    command = ["train-clip-gen", "--data", folders / "photos", "--clip", folders / "clip", "--out", out]
    sizes = ["--model.num-layers", 1, "--model.hidden-size", 32, "--steps", 2, "--device", "cpu"]
    assert main([str(word) for word in (*command, *sizes)]) == 0
    drawn = ["clip-generate", "--run", out, "a dog", "--num", 2, "--out", out / "dog.png", "--device", "cpu"]
    assert main([str(word) for word in drawn]) == 0
    assert (
        out / "dog.png"
    ).exists() and "2 pictures, best first by clip, cosine from" in capsys.readouterr().out
    save_tiny_clip(folders / "wide", width=12)
    assert main([str(word) for word in (*drawn, "--force", "--clip", folders / "wide")]) == 2
    assert "embeddings of 8 numbers, the CLIP in" in capsys.readouterr().err
    assert main([str(word) for word in (*command[:2], folders / "clip", *command[3:], *sizes)]) == 2
    assert "has no pictures" in capsys.readouterr().err


def parts(three_region=None, seed=0):
    torch.manual_seed(seed)
    tokenizer = ImageTokenizer(PRESET.image_tokenizer).eval().requires_grad_(False)
    config = clip_gen_config(dataclasses.replace(MODEL, three_region=three_region), tokenizer.config)
    return ClipGen(config, 8), tokenizer


class ColourClip:
    """The mean colours of four quarters, for embeddings whose gradient is known to reach the pixels."""

    width = 8

    def of_images(self, images):
        quarters = torch.nn.functional.adaptive_avg_pool2d(images[:, :2], 2).flatten(1)
        return torch.nn.functional.normalize(quarters, dim=1)

    def of_texts(self, texts):
        raise AssertionError("a text was read")


@pytest.mark.parametrize("three_region", [None, ThreeRegionConfig(4, 2, 8)])
@pytest.mark.parametrize("parallel", [1, 3])
def test_the_cache_draws_what_the_whole_prefix_read_anew_draws(three_region, parallel):
    model, _ = parts(three_region)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that every part matters
    embeddings = torch.nn.functional.normalize(torch.randn(2, 8), dim=1)
    (batch,) = draw_from_embeddings(model, embeddings, 2, DrawOptions(GREEDY, parallel=parallel))
    codes = torch.empty(2, 0, dtype=torch.int64)
    for _ in range(model.config.max_positions):
        hidden = model(embeddings, codes)[:, -1]
        best = model.transformer.logits(hidden, 0, model.config.vocab_size).argmax(-1)
        codes = torch.cat([codes, best[:, None]], dim=1)
    assert batch.codes.tolist() == codes.repeat_interleave(2, 0).tolist()
    assert len(codes.unique()) > 2 and batch.requests == [0, 0, 1, 1]


def trainer_of(config, three_region=None):
    model, tokenizer = parts(three_region)
    pictures = EncodedPictures(
        torch.randint(16, (6, 16)), torch.nn.functional.normalize(torch.rand(6, 8), dim=1)
    )
    return ClipGenTrainer(model, pictures, Judges(tokenizer, ColourClip()), config)


def test_the_second_loss_reaches_the_weights():
    trainer = trainer_of(TRAIN)
    codes, embeddings = trainer.pictures
    hidden = trainer.model(embeddings, codes[:, :-1])
    loss = trainer._embedding_loss(hidden, embeddings)
    assert 0 < loss.item() < 2
    loss.backward()
    assert trainer.model.condition.weight.grad.abs().sum() > 0
    assert trainer.model.transformer.word_embeddings.weight.grad.abs().sum() > 0


def test_three_region_attention_trains_too(tmp_path):
    trainer = trainer_of(dataclasses.replace(TRAIN, steps=2), ThreeRegionConfig(4, 2, 8))
    history = run_loop(trainer, trainer.config, tmp_path, progress=False)
    assert all(loss > 0 for loss in history["code_loss"])


def test_a_killed_run_resumes_to_the_same_bits(folders, monkeypatch):
    options = wanted(folders, run_at(folders, "whole"), embedding_noise=0.1, precision="bf16")
    whole = train_clip_gen(options, WithoutCaptions())
    cut = dataclasses.replace(options, out=run_at(folders, "cut"))
    die_in_step(4, monkeypatch, training)
    with pytest.raises(RuntimeError, match="killed"):
        train_clip_gen(cut, WithoutCaptions())
    monkeypatch.undo()
    moved = shutil.copytree(folders / "clip", folders / "moved clip")
    assert train_clip_gen(dataclasses.replace(cut, clip=moved), WithoutCaptions()) == whole
    other = save_tiny_clip(folders / "other clip", seed=1)
    with pytest.raises(ValueError, match="the CLIP is not the one that"):
        train_clip_gen(dataclasses.replace(cut, clip=other), WithoutCaptions())


def test_noise_has_its_length_and_keeps_the_sphere():
    embeddings = torch.nn.functional.normalize(torch.randn(500, 64), dim=1)
    moved = noisy(embeddings, 0.5)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(500))
    cosine = (moved * embeddings).sum(1).mean().item()
    assert cosine == pytest.approx((1 + 0.25) ** -0.5, abs=0.02)  # as the noise is all but orthogonal
    torch.testing.assert_close(noisy(embeddings, 0.0), embeddings)


def test_the_three_orders():
    row = [
        ClipDrawing(None, "x", number, cosine, loss)
        for number, (cosine, loss) in enumerate([(0.1, 3.0), (0.3, 2.0), (0.2, 1.0)])
    ]
    order = {rank: [d.candidate for d in ranked(row, rank)] for rank in ("clip", "cap-loss", "both")}
    assert order == {"clip": [1, 2, 0], "cap-loss": [2, 1, 0], "both": [1, 2, 0]}
