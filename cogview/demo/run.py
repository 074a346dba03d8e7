# SPDX-License-Identifier: Apache-2.0
"""CogView on handwritten digits, from raw scans to reranked drawings, in minutes on two CPU cores.

Phases: train the tokenizers, train the transformer on rows of both orders, draw 16 candidates for every
prompt, rerank them by CapLoss with the same model, let a judge read them. All prompts are in phrasings
that training never saw. Each phase picks up where an interrupted run stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cogview.config import Preset
from cogview.data.digits import HELD_OUT_PHRASINGS, TRAINING_PHRASINGS
from cogview.demo.judge import Judge
from cogview.demo.plots import save_demo_curves, save_demo_sheet
from cogview.demo.report import (
    CURVES,
    REPORT,
    SHEET,
    Drawings,
    all_prompts,
    drawings_report,
    environment,
    prompts_report,
    run_report,
)
from cogview.device import default_device
from cogview.evaluation.rerank import rerank
from cogview.files import StrPath, load_tensors, read_json, save_tensors, write_json
from cogview.generation.engine import DrawOptions
from cogview.generation.text_to_image import generate_codes
from cogview.presets import PRESETS
from cogview.progress import Progress
from cogview.run import Run, load_run
from cogview.seeding import derive_seed
from cogview.settings import claim_settings, plain
from cogview.training.pipeline import TrainModel, TrainTokenizers, train_model, train_tokenizers


@dataclass(frozen=True)
class Demo:
    """What the demo does. The defaults are what the command runs."""

    out: StrPath = Path("runs/demo")
    seed: int = 0
    preset: Preset = PRESETS["digits"]
    num_candidates: int = 16
    draws: int = 4  # times every prompt is drawn anew; 10 digits x 6 phrasings x 4 = 240 prompts
    device: str = field(default_factory=default_device)
    progress: bool = True


@dataclass(frozen=True)
class DemoSettings:
    """What a demo was started with, ``demo.json`` in its folder."""

    seed: int
    num_candidates: int
    draws: int
    preset: Preset
    training_phrasings: Any = TRAINING_PHRASINGS
    held_out_phrasings: Any = HELD_OUT_PHRASINGS


class PhaseClock:
    """Wall-clock and processor seconds per phase, summed over interrupted runs, in ``timings.json``.

    Processor seconds count every thread, so they tell the work from the waiting on a busy machine.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        empty: dict[str, Any] = {"starts": 0, "seconds": {}, "processor_seconds": {}}
        self.timings = read_json(path) if path.exists() else empty
        self.timings["starts"] += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; also when it is interrupted."""
        starts = {"seconds": time.perf_counter(), "processor_seconds": time.process_time()}
        try:
            yield
        finally:
            stops = {"seconds": time.perf_counter(), "processor_seconds": time.process_time()}
            for unit, start in starts.items():
                spent = self.timings[unit]
                spent[name] = round(spent.get(name, 0.0) + stops[unit] - start, 2)
            write_json(self._path, self.timings)


def run_demo(options: Demo) -> dict[str, Any]:
    """Train, draw, rerank, judge; writes pictures and ``report.json`` to ``out`` and returns the report."""
    out = Path(options.out)
    preset = dataclasses.replace(
        options.preset,
        train=dataclasses.replace(options.preset.train, seed=options.seed),
        image_tokenizer_train=dataclasses.replace(options.preset.image_tokenizer_train, seed=options.seed),
    )
    settings = DemoSettings(options.seed, options.num_candidates, options.draws, preset)
    claim_settings(out / "demo.json", settings)
    clock = PhaseClock(out / "timings.json")
    device, progress = options.device, options.progress
    with clock.phase("train_tokenizers"):
        tokenizer_history = train_tokenizers(TrainTokenizers("digits", out, preset, device, progress))
    with clock.phase("train_model"):
        history = train_model(TrainModel("digits", out, preset, device, progress))
    run = load_run(out, device)
    prompts = all_prompts(options.draws)
    with clock.phase("draw_and_rerank"):
        plan = DrawPlan(out, options.seed, options.num_candidates, progress)
        codes, losses = draw_prompts(plan, run, prompts)
    with clock.phase("judge_and_report"):
        judge = Judge()
        images = run.pixels(codes).cpu()
        seen = judge(images.flatten(0, 1)).view(losses.shape)
        drawings = Drawings(prompts, images, losses, seen)
        report = {
            "seed": options.seed,
            **drawings_report(drawings),
            **run_report(run, judge),
            "final_losses": {name: sum(values[-50:]) / len(values[-50:]) for name, values in history.items()},
            "settings": plain(settings),
            "environment": environment(device),
            "prompts": prompts_report(drawings),
        }
        save_demo_sheet(out / SHEET, drawings, report["results"])
        save_demo_curves(out / CURVES, history, tokenizer_history)
    report["timings"] = {**clock.timings, "total_seconds": round(sum(clock.timings["seconds"].values()), 2)}
    write_json(out / REPORT, plain(report))
    return report


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
            codes.append(saved["codes"])
            losses.append(saved["losses"])
    return torch.cat(codes), torch.cat(losses)
