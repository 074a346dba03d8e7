# SPDX-License-Identifier: Apache-2.0
"""The study of a VQGAN beside a VQ-VAE: what is measured, written, and not done twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

import cogview.evaluation.vqgan_study as study
from cogview.commands import verbs
from cogview.data.digits import DigitPairs
from cogview.evaluation import studied_tokenizer
from cogview.files import read_json
from cogview.options import Study
from cogview.presets import PRESETS

DIGITS = PRESETS["digits"]


class FewDigits(DigitPairs):
    """Twenty scans."""

    def __len__(self) -> int:
        return 20


def test_both_kinds_are_trained_once_measured_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_pictures", lambda preset: (FewDigits(), FewDigits("test")))
    training = dataclasses.replace(DIGITS.image_tokenizer_train, steps=2, batch_size=4)
    preset = dataclasses.replace(DIGITS, image_tokenizer_train=training)
    options = study.VQGANStudy(tmp_path, preset, "cpu", progress=False)
    records = study.study_vqgan(options)
    assert [record["kind"] for record in records] == ["vqvae", "vqgan"]
    assert all(record["psnr_db"] > 0 and 0 <= record["feature_distance"] <= 2 for record in records)
    assert len(read_json(tmp_path / "vqgan" / "history.json")["discriminator"]) == 2
    assert read_json(tmp_path / "vqgan.json")["tokenizers"] == records
    assert "sharpness" in study.vqgan_table(records)
    with Image.open(tmp_path / "vqgan.png") as sheet:
        assert min(sheet.size) > 40
    monkeypatch.setattr(studied_tokenizer, "train_image_tokenizer", None)
    assert study.study_vqgan(options) == records


def test_more_than_one_seed_is_refused():
    with pytest.raises(ValueError, match=r"--seeds must be 1 for vqgan.*got 2"):
        Study("vqgan", Path("unused"), seeds=2)


def test_studies_of_tokenizers_alone_take_a_precision(monkeypatch):
    asked = []
    monkeypatch.setattr(verbs, "_STUDIES", {"vqgan": lambda given, changes: asked.append(changes)})
    verbs.study(Study("vqgan", Path("unused"), precision="bf16"))
    assert asked == [{"precision": "bf16"}]
    with pytest.raises(ValueError, match="--precision does not belong to stability"):
        Study("stability", Path("unused"), precision="bf16")
    with pytest.raises(ValueError, match="--precision belongs to a study that trains"):
        Study("style", Path("unused"), precision="bf16", runs=(Path("run"),))
