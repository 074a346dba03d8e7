# SPDX-License-Identifier: Apache-2.0
"""Digits over three seeds: three-region against dense attention, and fp32 against bf16 against fp16.

``python -m benchmarks.digits_study --out FOLDER`` trains one model after another, those of ``attention``
first. A seed has one pair of tokenizers, one initialisation and one order of batches for all its models. A
finished model is not trained again and an interrupted one goes on, so the command can be stopped and
repeated. After each model it writes ``digits.json``, ``README.md`` and ``digits.png`` into FOLDER.

Judged are held-out scans with every caption of training, in both orders. Nothing is dropped out then.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.results import write, write_json
from cogview.config import Preset
from cogview.data.digits import DigitPairs
from cogview.data.rows import Rows
from cogview.data.tokens import TokenDataset
from cogview.files import read_json
from cogview.images import save_figure
from cogview.presets import PRESETS
from cogview.run import Run, load_run
from cogview.seeding import derive_seed
from cogview.settings import TOKENIZER_SETTINGS, claim_settings
from cogview.tokens.tokenizers import IMAGE_TOKENIZER, TEXT_TOKENIZER
from cogview.training.pipeline import TrainModel, TrainTokenizers, train_model, train_tokenizers
from cogview.training.transformer import losses_of, sample_layouts

SEEDS = (0, 1, 2)
PASSES = 4  # times that each held-out scan is judged, each time with another caption or in another order


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    study: str
    name: str
    three_region: bool
    precision: str
    steps: int

    def preset(self, seed: int) -> Preset:
        """The digits preset, changed accordingly."""
        preset = PRESETS["digits"]
        regions = preset.model.three_region if self.three_region else None
        changes: dict[str, Any] = {"precision": self.precision, "steps": self.steps, "seed": seed}
        return dataclasses.replace(
            preset,
            model=dataclasses.replace(preset.model, three_region=regions),
            train=dataclasses.replace(preset.train, **changes),
            image_tokenizer_train=dataclasses.replace(preset.image_tokenizer_train, seed=seed),
        )


def all_variants(steps: int, steps_of_precisions: int) -> list[Variant]:
    """What is compared, the judge of each study first."""
    attention = [
        Variant("attention", name, name != "dense", "fp32", steps) for name in ("dense", "three-region")
    ]
    names = ("fp32", "bf16", "fp16")
    return attention + [Variant("precision", name, True, name, steps_of_precisions) for name in names]


@torch.no_grad()
def validation_losses(run: Run, *, dense: bool) -> dict[str, float]:
    """Nats per token of the held-out scans and captions; under dense attention, or as the model trains."""
    test = DigitPairs("test")
    tokenizers, places = run.tokenizers, range(len(test))
    codes = run.encode([test.image(index, tokenizers.image.config.image_size) for index in places])
    texts = [[tokenizers.text.encode(caption) for caption in test.captions(index)] for index in places]
    rows = Rows.in_memory(tokenizers.vocab, codes, texts)
    dataset = TokenDataset(tokenizers.vocab, rows, run.model.config.max_positions)
    train = PRESETS["digits"].train
    sums = torch.zeros(3)
    for index in range(PASSES):
        # The rows are the same for every model of a seed.
        batch = dataset.batch(
            index,
            len(test),
            text_weight=train.text_weight,
            caption_fraction=train.caption_fraction,
            seed=derive_seed(0, "held out"),
        )
        generator = torch.Generator().manual_seed(derive_seed(0, "held-out layouts", index))
        layouts = None if dense else sample_layouts(run.model.config, batch, generator)
        sums += torch.stack(losses_of(run.model, batch, layouts))
    loss, image, text = (sums / PASSES).tolist()
    return {"loss": loss, "image_loss": image, "text_loss": text}


def train_one(out: Path, variant: Variant, seed: int) -> dict[str, Any]:
    """Train one model, or go on with it, and judge it."""
    tokenizers, folder = out / f"seed{seed}-tokenizers", out / f"seed{seed}-{variant.study}-{variant.name}"
    preset = variant.preset(seed)
    train_tokenizers(TrainTokenizers("digits", tokenizers, preset, "cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TOKENIZER_SETTINGS, TEXT_TOKENIZER, IMAGE_TOKENIZER):
        shutil.copy(tokenizers / name, folder / name)
    started = time.process_time()
    history = train_model(TrainModel("digits", folder, preset, "cpu"))
    seconds = time.process_time() - started
    run = load_run(folder, "cpu")
    return {
        "study": variant.study,
        "variant": variant.name,
        "seed": seed,
        "steps": variant.steps,
        "validation": validation_losses(run, dense=False),
        "validation_under_dense_attention": validation_losses(run, dense=True),
        "last_training_losses": {
            name: statistics.mean(history[name][-50:]) for name in ("image_loss", "text_loss")
        },
        "processor_seconds_of_the_last_start": round(seconds, 1),
    }


def table(rows: Sequence[dict[str, Any]], variants: Sequence[Variant]) -> str:
    """Validation loss by variant: each seed, mean and spread, and the difference to the first variant."""
    study = variants[0].study
    found = {
        (row["variant"], row["seed"]): row["validation"]["loss"] for row in rows if row["study"] == study
    }
    lines = []
    for variant in variants:
        values = [found.get((variant.name, seed)) for seed in SEEDS]
        known = [value for value in values if value is not None]
        pairs = [(found.get((variant.name, seed)), found.get((variants[0].name, seed))) for seed in SEEDS]
        gaps = [mine - first for mine, first in pairs if mine is not None and first is not None]
        lines.append(
            [
                variant.name,
                *("unmeasured" if value is None else f"{value:.4f}" for value in values),
                _mean_and_spread(known, ""),
                "" if variant is variants[0] else _mean_and_spread(gaps, "+"),
            ]
        )
    header = [
        "variant",
        *(f"seed {seed}" for seed in SEEDS),
        "mean ± s.d.",
        f"minus {variants[0].name}, ± s.d.",
    ]
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


def _mean_and_spread(values: Sequence[float], sign: str) -> str:
    if not values:
        return "unmeasured"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{spread}"


def page(rows: Sequence[dict[str, Any]], variants: Sequence[Variant]) -> str:
    """The README of the folder: what was trained, how, and what came out."""
    attention = [variant for variant in variants if variant.study == "attention"]
    precision = [variant for variant in variants if variant.study == "precision"]
    dense = [
        f"{row['variant']} {row['validation_under_dense_attention']['loss']:.4f} (seed {row['seed']})"
        for row in rows
        if row["study"] == "attention" and row["variant"] == "three-region"
    ]
    return f"""# Digits over three seeds

Written by `python -m benchmarks.digits_study`, from [digits.json](digits.json). It trains the transformer
of the preset `digits` (0.6 million parameters). A seed has one pair of tokenizers, one initialisation and one
order of batches for all its models. The figures are the validation loss in nats per token, weighted as in
training: held-out scans, each {PASSES} times with a caption of training, the same rows for every model of a
seed. Differences are taken within a seed: two seeds have different codes, hence different losses.

## Three-region against dense attention

{attention[0].steps} steps, float32. The preset has {PRESETS["digits"].train.steps}.

{table(rows, attention)}

Judged under dense attention, which is how it draws, the model that trained with three-region attention
reaches: {", ".join(dense) or "unmeasured"}.

## Precision

{precision[0].steps} steps, three-region attention. All models are judged in float32.

{table(rows, precision)}

![Validation loss by variant and seed](digits.png)
"""


def plot(path: Path, rows: Sequence[dict[str, Any]], variants: Sequence[Variant]) -> None:
    """One point per model, one panel per study."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    for axes, study in zip(figure.subplots(1, 2), ("attention", "precision"), strict=True):
        shown = [variant for variant in variants if variant.study == study]
        names = [variant.name for variant in shown]
        for seed in SEEDS:
            mine = [row for row in rows if row["study"] == study and row["seed"] == seed]
            places = [names.index(row["variant"]) for row in mine]
            losses = [row["validation"]["loss"] for row in mine]
            axes.plot(places, losses, "o-", linewidth=0.8, label=f"seed {seed}")
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_title(f"{study}, {shown[0].steps} steps", fontsize=10)
        axes.set_ylabel("validation loss, nats per token")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the models and the results")
    default = PRESETS["digits"].train.steps
    parser.add_argument("--steps", type=int, default=default, help="of dense and three-region attention")
    # On a processor without 16-bit units a step in 16 bits takes many times as long.
    parser.add_argument("--steps-of-precisions", type=int, default=240, help="of fp32, bf16 and fp16")
    given = parser.parse_args()
    out, variants = given.out, all_variants(given.steps, given.steps_of_precisions)
    claim_settings(
        out / "settings.json", {"steps": given.steps, "steps_of_precisions": given.steps_of_precisions}
    )
    path = out / "digits.json"
    document: dict[str, Any] = read_json(path) if path.exists() else {"rows": []}
    document["environment"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch_threads": torch.get_num_threads(),
    }
    rows = document["rows"]
    done = {(row["study"], row["variant"], row["seed"]) for row in rows}
    order = sorted(
        ((variant, seed) for variant in variants for seed in SEEDS), key=lambda v: (v[0].study, v[1])
    )
    for variant, seed in order:
        if (variant.study, variant.name, seed) in done:
            continue
        rows.append(train_one(out, variant, seed))
        write_json(path, document)
        write(out / "README.md", page(rows, variants))
        plot(out / "digits.png", rows, variants)
    print(page(rows, variants))


if __name__ == "__main__":
    main()
