# SPDX-License-Identifier: Apache-2.0
"""The study of the digits: what its models are, and what it makes of their losses. Nothing is trained."""

from PIL import Image

from benchmarks.digits_study import all_variants, page, plot, table
from cogview.presets import PRESETS

VARIANTS = all_variants(600, 120)


def row(study, variant, seed, loss):
    return {
        "study": study,
        "variant": variant,
        "seed": seed,
        "validation": {"loss": loss},
        "validation_under_dense_attention": {"loss": loss + 0.5},
    }


ROWS = [
    *(row("attention", "dense", seed, loss) for seed, loss in enumerate((2.0, 2.1, 2.2))),
    *(row("attention", "three-region", seed, loss) for seed, loss in enumerate((2.01, 2.13, 2.22))),
    row("precision", "bf16", 1, 3.0),
]


def test_variants_differ_in_what_they_are_named_after_only():
    digits = PRESETS["digits"]
    for variant in VARIANTS:
        preset = variant.preset(seed=2)
        assert preset.train.seed == preset.image_tokenizer_train.seed == 2
        assert preset.train.precision == variant.precision
        assert preset.train.steps == (600 if variant.study == "attention" else 120)
        assert preset.model.three_region == (None if variant.name == "dense" else digits.model.three_region)
    assert [variant.name for variant in VARIANTS] == ["dense", "three-region", "fp32", "bf16", "fp16"]


def test_differences_are_taken_within_a_seed_and_gaps_are_called_unmeasured(tmp_path):
    dense, regions = table(ROWS, VARIANTS[:2]).splitlines()[2:]
    assert "2.1000 ± 0.1000" in dense
    assert "2.1200 ± 0.1054" in regions and "+0.0200 ± 0.0100" in regions
    fp32, bf16, fp16 = table(ROWS, VARIANTS[2:]).splitlines()[2:]
    assert fp32.count("unmeasured") == 4 and fp16.count("unmeasured") == 5
    assert "3.0000" in bf16 and bf16.count("unmeasured") == 3
    text = page(ROWS, VARIANTS)
    assert "three-region 2.5100 (seed 0)" in text and dense in text
    plot(tmp_path / "digits.png", ROWS, VARIANTS)
    with Image.open(tmp_path / "digits.png") as picture:
        assert min(picture.size) > 300
