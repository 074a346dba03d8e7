# SPDX-License-Identifier: Apache-2.0
"""Studies of the paper's claims. ``stability``: what keeps a deep training in float16 alive.

CogView (arXiv:2105.13290, section 2.4 and figure 3) reports of a toy model, deep and with a high learning
rate, that training without Sandwich-LN overflows in the main branch, training without PB-Relax overflows in
attention, and only training with both goes on. This repeats it, on digits whose pixels are the tokens.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from cogview.config import STUDY_SEEDS, ModelConfig, TrainConfig, require_seeds
from cogview.data.digits import splits
from cogview.data.rows import Rows
from cogview.data.tokens import TokenDataset
from cogview.device import default_device
from cogview.evaluation.half import HalfTrainer, Techniques
from cogview.evaluation.study_plots import save_stability_plot
from cogview.files import StrPath, write_csv, write_json, write_text
from cogview.progress import Progress
from cogview.seeding import derive_seed
from cogview.settings import claim_settings, plain, read_built
from cogview.tokens.sequence import FRAME_TOKENS
from cogview.tokens.vocab import Vocab

VARIANTS: dict[str, Techniques] = {
    "neither": Techniques(),
    "PB-Relax": Techniques(pb_relax=True),
    "Sandwich-LN": Techniques(sandwich_norm=True),
    "both": Techniques(pb_relax=True, sandwich_norm=True),
    "neither, shrunk embedding gradient": Techniques(embedding_gradient=0.1),
    "both, shrunk embedding gradient": Techniques(pb_relax=True, sandwich_norm=True, embedding_gradient=0.1),
    "neither, float32 trunk": Techniques(float32_trunk=True),
    "neither, float32 trunk, resblock scaling": Techniques(float32_trunk=True, resblock_scaling=True),
}
SIZES_OF_STEP = {"trunk", "scores", "branches"}  # of which a training keeps the largest number
PIXEL_LEVELS = 17  # of the scans
PIXELS = 64
VOCAB = Vocab(PIXEL_LEVELS, num_text_pieces=10)  # a caption is one token, the digit
ROW = FRAME_TOKENS + 1 + PIXELS


def _shape(num_layers: int, hidden_size: int, num_heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers,
        hidden_size,
        num_heads,
        vocab_size=VOCAB.padded_size,
        max_positions=ROW,
        init_std=hidden_size**-0.5,
        dropout=0.0,
    )


@dataclass(frozen=True)
class StudySize:
    """A deep and narrow model, and a learning rate that is high for it, from the first step on."""

    model: ModelConfig
    batch_size: int
    steps: int
    learning_rate: float

    def __post_init__(self) -> None:
        self.training()  # ValueError for what no training takes, before a study's folder is bound to it

    def training(self) -> TrainConfig:
        """How each model is trained."""
        return TrainConfig(steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate)


SIZES: dict[str, StudySize] = {
    "small": StudySize(_shape(24, 64, 2), batch_size=2, steps=100, learning_rate=0.2),
    "paper": StudySize(_shape(64, 1024, 16), batch_size=16, steps=1000, learning_rate=0.01),
}


@dataclass(frozen=True)
class StabilityStudy:
    """What :func:`study_stability` does."""

    out: StrPath
    size: StudySize = SIZES["small"]
    seeds: int = STUDY_SEEDS
    device: str = field(default_factory=default_device)
    progress: bool = True

    def __post_init__(self) -> None:
        require_seeds(self.seeds)


@dataclass(frozen=True)
class Place:
    """Where a value was first seen that is not finite."""

    step: int
    where: str


@dataclass(frozen=True)
class RunRecord:
    """What is kept of a training, a file of ``runs/``."""

    variant: str
    seed: int
    steps: int
    overflow: Place | None
    bad_gradients: list[dict[str, Any]]
    dropped_blocks: int
    loss: list[float]
    scale: list[float]
    largest: dict[str, list[float]]
    largest_by_layer: dict[str, list[float]]


@dataclass(frozen=True)
class StabilitySettings:
    """What a study was started with, ``settings.json`` in its folder."""

    size: StudySize


def study_stability(options: StabilityStudy) -> list[dict[str, Any]]:
    """Train every variant of :data:`VARIANTS` with every seed until it overflows; returns one record per run.

    Writes each finished run to ``runs/`` below ``out``, so that an interrupted study goes on after it. At the
    end, and on Ctrl-C, writes ``stability.json`` (all finished runs), ``stability.csv`` (the table) and
    ``stability.png``.

    Raises:
        ValueError: the folder holds a study of another size.
    """
    out, size = Path(options.out), options.size
    claim_settings(out / "settings.json", StabilitySettings(size))
    scans, labels = splits()["train"]
    captions = [[[int(label)]] for label in labels]
    dataset = TokenDataset(VOCAB, Rows.in_memory(VOCAB, torch.tensor(scans).long(), captions), ROW)
    records: list[dict[str, Any]] = []
    total = len(VARIANTS) * options.seeds * size.steps
    try:
        with Progress(total, "stability", enabled=options.progress) as bar:
            for name, seed in itertools.product(VARIANTS, range(options.seeds)):
                path = out / "runs" / f"{_file_name(name)}-seed{seed}.json"
                if path.exists():
                    bar.update(size.steps)
                else:
                    write_json(path, _run(options, name, seed, dataset, bar))
                records.append(_read_run(path, name, seed))
    finally:
        if records:
            write_text(out / "stability.json", _json(records))
            rows = stability_rows(records)
            write_csv(out / "stability.csv", rows[0], (row.values() for row in rows))
            save_stability_plot(out / "stability.png", records)
    return records


def _file_name(variant: str) -> str:
    return variant.lower().replace(", ", "-").replace(" ", "-")


def _read_run(path: Path, variant: str, seed: int) -> dict[str, Any]:
    """ValueError unless the file holds such a training."""
    record = read_built(RunRecord, path)
    if (record.variant, record.seed) != (variant, seed) or not record.largest.keys() >= SIZES_OF_STEP:
        raise ValueError(f"{path} is damaged: it holds no training of {variant} with seed {seed}; remove it")
    return plain(record)


def _run(
    options: StabilityStudy, variant: str, seed: int, dataset: TokenDataset, bar: Progress
) -> dict[str, Any]:
    """One training, to its end or to the first value of a forward pass that is not finite."""
    size = options.size
    torch.manual_seed(derive_seed(seed, "study"))
    trainer = HalfTrainer(size.model, size.training(), VARIANTS[variant], torch.device(options.device))
    record: dict[str, Any] = {
        "variant": variant,
        "seed": seed,
        "steps": size.steps,
        "overflow": None,
        "bad_gradients": [],
        "dropped_blocks": 0,
        "loss": [],
        "scale": [],
        "largest": {name: [] for name in sorted(SIZES_OF_STEP)},
        "largest_by_layer": {},
    }
    for step in range(size.steps):
        batch = dataset.batch(step, size.batch_size, text_weight=1.0, caption_fraction=0.0, seed=seed)
        seen = trainer.step(batch)
        if seen.overflow:
            record["overflow"] = {"step": step, "where": seen.overflow}
            bar.update(size.steps - step, f"{variant}, seed {seed}: {seen.overflow} at step {step}")
            break
        if seen.bad_gradient:
            record["bad_gradients"].append({"step": step, "where": seen.bad_gradient, "scale": seen.scale})
        record["dropped_blocks"] += seen.dropped_blocks
        record["loss"].append(_short(seen.loss))
        record["scale"].append(_short(seen.scale))
        for name, values in seen.sizes.items():
            record["largest"][name].append(_short(max(values)))
        record["largest_by_layer"] = {
            name: [_short(value) for value in values] for name, values in seen.sizes.items()
        }
        bar.update(values=f"{variant}, seed {seed}: loss {seen.loss:.2f}")
    return record


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def place(where: str) -> str:
    """In a few words, the part of the model that a watch has named."""
    layer = next((f", layer {word}" for word in where.split(".") if word.isdigit()), "")
    if ".softmax" in where:
        return f"attention scores{layer}"
    # The sums of the trunk are taken between the modules: what is not finite in them is first seen here.
    if (where.endswith(".mlp") and "input" in where) or where.split(".")[-1].isdigit():
        return f"main branch{layer}"
    if ".attention" in where or ".mlp" in where:
        return f"{'attention' if '.attention' in where else 'MLP'}{layer}"
    return where


def stability_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of the table per run."""
    return [
        {
            "variant": record["variant"],
            "seed": record["seed"],
            "first overflow": "none" if record["overflow"] is None else record["overflow"]["step"],
            "in": "" if record["overflow"] is None else place(record["overflow"]["where"]),
            "skipped steps": len(record["bad_gradients"]),
            "dropped blocks": record["dropped_blocks"],
            "largest in trunk": max(record["largest"]["trunk"], default=math.nan),
            "of scores": max(record["largest"]["scores"], default=math.nan),
            "of branches": max(record["largest"]["branches"], default=math.nan),
            "last loss": record["loss"][-1] if record["loss"] else math.nan,
        }
        for record in records
    ]


def stability_table(records: Sequence[dict[str, Any]], tablefmt: str = "simple") -> str:
    """The rows of :func:`stability_rows` as text."""
    return tabulate(stability_rows(records), headers="keys", tablefmt=tablefmt, floatfmt=".3g")


def _json(records: Sequence[dict[str, Any]]) -> str:
    """A line per run: a person looks at the table, not at these many numbers."""
    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"


def finding(records: Sequence[dict[str, Any]]) -> str:
    """Whether the runs show what the paper reports, in one or more sentences."""
    expected = {"neither": "main branch", "PB-Relax": "main branch", "Sandwich-LN": "attention", "both": ""}
    lines = []
    for variant, where in expected.items():
        runs = [record["overflow"] for record in records if record["variant"] == variant]
        places = ["" if overflow is None else place(overflow["where"]) for overflow in runs]
        agree = sum(found.startswith(where) if where else not found for found in places)
        does = f"overflow in the {where}" if where else "go on to the end"
        line = f"{variant}: {agree} of {len(runs)} runs {does}"
        lines.append(line + (", unlike the paper's" if agree < len(runs) else ""))
    return "; ".join(lines) + "."
