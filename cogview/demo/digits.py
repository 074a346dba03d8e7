# SPDX-License-Identifier: Apache-2.0
"""CogView on handwritten digits, from raw scans to reranked drawings, in minutes on two CPU cores.

Phases: train the tokenizers, train the transformer on rows of both orders, draw 16 candidates for every
prompt, rerank them by CapLoss with the same model, let a judge read them. All prompts are in phrasings
that training never saw. Each phase picks up where an interrupted run stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cogview.config import Preset
from cogview.data.digits import HELD_OUT_PHRASINGS, TRAINING_PHRASINGS
from cogview.demo.judge import Judge
from cogview.demo.plots import save_demo_sheet
from cogview.demo.report import SHEET, Drawings, all_prompts, drawings_report, prompts_report, run_report
from cogview.demo.run import Subject, run_phases, seeded
from cogview.device import default_device
from cogview.files import StrPath
from cogview.presets import PRESETS
from cogview.run import Run


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


def run_demo(options: Demo) -> dict[str, Any]:
    """See :func:`cogview.demo.run.run_phases`; the sheet of pictures is written to ``out`` as well."""
    preset = seeded(options.preset, options.seed)
    settings = DemoSettings(options.seed, options.num_candidates, options.draws, preset)
    prompts = all_prompts(options.draws)

    def judged(run: Run, codes: Tensor, losses: Tensor) -> dict[str, Any]:
        judge = Judge()
        images = run.pixels(codes).cpu()
        seen = judge(images.flatten(0, 1)).view(losses.shape)
        drawings = Drawings(prompts, images, losses, seen)
        results = drawings_report(drawings)
        save_demo_sheet(Path(options.out) / SHEET, drawings, results["results"])
        return {**results, **run_report(run, judge), "prompts": prompts_report(drawings)}

    return run_phases(options, Subject("digits", preset, settings, prompts, judged))
