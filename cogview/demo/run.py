# SPDX-License-Identifier: Apache-2.0
"""What every demo does: trains, draws what is asked for, reranks by CapLoss, lets a judge read, reports.

Each phase picks up where an interrupted run stopped. :mod:`cogview.demo.digits` and
:mod:`cogview.demo.emoji` say what is asked for and who judges.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from cogview.config import Preset, TrainPrecision
from cogview.demo.plots import save_demo_curves
from cogview.demo.report import CURVES, REPORT, environment
from cogview.evaluation.rerank import rerank
from cogview.files import StrPath, load_tensors, read_json, save_tensors, write_json
from cogview.generation.engine import DrawOptions
from cogview.generation.text_to_image import generate_codes
from cogview.progress import Progress
from cogview.run import Run, load_run
from cogview.seeding import derive_seed
from cogview.settings import claim_settings, plain, read_built
from cogview.tokens.tokenizers import fingerprint_tokenizers
from cogview.training.loop import late_mean
from cogview.training.pipeline import TrainModel, TrainTokenizers, train_model, train_tokenizers
from cogview.training.start import Start

DEMO_SETTINGS = "demo.json"


class Options(Protocol):
    """What every demo is told."""

    @property
    def out(self) -> StrPath: ...

    @property
    def seed(self) -> int: ...

    @property
    def num_candidates(self) -> int: ...

    @property
    def device(self) -> str: ...

    @property
    def progress(self) -> bool: ...


@dataclass(frozen=True)
class Subject:
    """What a demo is about."""

    data: str  # a built-in set
    preset: Preset  # see :func:`seeded`
    settings: Any  # dataclass of what the demo was started with, ``demo.json`` in its folder
    prompts: Sequence[Asked]
    # ``judge(run, codes, losses)`` gives its part of the report and writes the sheet of pictures.
    judge: Callable[[Run, Tensor, Tensor], dict[str, Any]]


def seeded(preset: Preset, seed: int) -> Preset:
    """``preset`` with ``seed`` for both trainings."""
    return dataclasses.replace(
        preset,
        train=dataclasses.replace(preset.train, seed=seed),
        image_tokenizer_train=dataclasses.replace(preset.image_tokenizer_train, seed=seed),
    )


def begun_precision(folder: StrPath) -> TrainPrecision | None:
    """The precision of a demo that goes on in ``folder``, maybe on another machine; None for a new one."""
    path = Path(folder) / DEMO_SETTINGS
    found = read_json(path) if path.exists() else None
    for key in ("preset", "train", "precision"):
        # Where the file is no demo's, the comparison of all settings says so.
        found = found.get(key) if isinstance(found, dict) else None
    return cast("TrainPrecision | None", found)


def run_phases(options: Options, subject: Subject) -> dict[str, Any]:
    """Train, draw, rerank, judge; writes curves and ``report.json`` to ``out`` and returns the report."""
    out, preset, data = Path(options.out), subject.preset, subject.data
    claim_settings(out / DEMO_SETTINGS, subject.settings)
    clock = PhaseClock(out / "timings.json")
    device, progress = options.device, options.progress
    with clock.phase("train_tokenizers"):
        tokenizer_history = train_tokenizers(TrainTokenizers(data, out, preset, device, progress))
    with clock.phase("train_model"):
        history = train_model(TrainModel(data, out, preset, device, progress))
    run = load_run(out, device)
    with clock.phase("draw_and_rerank"):
        plan = DrawPlan(out, options.seed, options.num_candidates, progress)
        codes, losses = draw_prompts(plan, run, subject.prompts)
    with clock.phase("judge_and_report"):
        report = {
            "seed": options.seed,
            **subject.judge(run, codes, losses),
            "model_parameters": run.model.num_parameters(),
            "final_losses": {name: late_mean(values) for name, values in history.items()},
            "settings": plain(subject.settings),
            "environment": environment(device),
        }
        save_demo_curves(out / CURVES, history, tokenizer_history)
    total = round(sum(clock.timings.seconds.values()), 2)
    report["timings"] = {**plain(clock.timings), "total_seconds": total}
    write_json(out / REPORT, plain(report))
    return report


@dataclass
class Timings:
    """``timings.json``: how often a demo was begun, and the seconds of each phase."""

    starts: int
    seconds: dict[str, float]
    processor_seconds: dict[str, float]


class PhaseClock:
    """Wall-clock and processor seconds per phase, summed over interrupted runs, in ``timings.json``.

    Processor seconds count every thread, so they tell the work from the waiting on a busy machine.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.timings = read_built(Timings, path) if path.exists() else Timings(0, {}, {})
        self.timings.starts += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; also when it is interrupted."""
        starts = {"seconds": time.perf_counter(), "processor_seconds": time.process_time()}
        try:
            yield
        finally:
            stops = {"seconds": time.perf_counter(), "processor_seconds": time.process_time()}
            for unit, start in starts.items():
                spent = getattr(self.timings, unit)
                spent[name] = round(spent.get(name, 0.0) + stops[unit] - start, 2)
            write_json(self._path, plain(self.timings))


class Asked(Protocol):
    """A prompt, and the number of the draw that it belongs to."""

    @property
    def text(self) -> str: ...

    @property
    def draw(self) -> int: ...


@dataclass(frozen=True)
class DrawPlan:
    """Where drawings are kept and how they are made."""

    out: StrPath
    seed: int
    num_candidates: int
    progress: bool


@dataclass(frozen=True)
class DrawnWith:
    """What the codes in a folder were drawn with: a file beside them, so that no others are mixed in."""

    weights: str  # fingerprint of what drew them
    candidates: int
    prompts: list[str]
    seed: int


def said_as(option: str, folder: StrPath) -> dict[str, str]:
    """How a message names what :class:`DrawnWith` holds; the run in ``folder`` was given by ``option``."""
    return {"weights": f"another {option} (now {folder}): weights"}


def fingerprint_run(folder: StrPath) -> str:
    """What tells the weights of a CogView from those of another, wherever the run lies."""
    return Start(folder, fingerprint_tokenizers(folder)).fingerprint


def draw_prompts(plan: DrawPlan, run: Run, prompts: Sequence[Asked]) -> tuple[Tensor, Tensor]:
    """Codes ``[prompts, candidates, num_codes]`` and CapLoss; a finished draw is read from its file.

    The prompts are in the order of their draws.
    """
    codes, losses = [], []
    num_codes = run.tokenizers.image.config.codes_per_image
    total = len(prompts) * plan.num_candidates * num_codes
    with Progress(total, "draw and rerank", unit="code", enabled=plan.progress) as bar:
        for draw in sorted({prompt.draw for prompt in prompts}):
            texts = [run.pieces(prompt.text) for prompt in prompts if prompt.draw == draw]
            path = Path(plan.out) / "draws" / f"draw-{draw}.safetensors"
            if path.exists():
                bar.update(len(texts) * plan.num_candidates * num_codes)
            else:
                seed = derive_seed(plan.seed, "draw", draw)
                drawn = generate_codes(
                    run.model,
                    run.tokenizers.vocab,
                    texts,
                    num_codes,
                    num_candidates=plan.num_candidates,
                    seeds=[derive_seed(seed, place) for place in range(len(texts))],
                    options=DrawOptions(run.sampling, max_batch=512, on_step=bar.update),
                )
                loss = rerank(run.model, run.tokenizers.vocab, texts, drawn)[1]
                save_tensors(path, {"codes": drawn, "losses": loss})
            saved = load_tensors(path)
            if {name: list(tensor.shape) for name, tensor in saved.items()} != {
                "codes": [len(texts), plan.num_candidates, num_codes],
                "losses": [len(texts), plan.num_candidates],
            }:
                raise ValueError(f"{path} is damaged: it holds no such drawings; remove it")
            codes.append(saved["codes"])
            losses.append(saved["losses"])
    return torch.cat(codes), torch.cat(losses)
