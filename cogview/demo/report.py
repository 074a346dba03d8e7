# SPDX-License-Identifier: Apache-2.0
"""What the demo says about itself: how many drawings show the right digit, and how it was set up."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.data.digits import HELD_OUT_PHRASINGS, DigitPairs, phrase
from cogview.demo.judge import Judge
from cogview.evaluation.cap_loss import caption_loss
from cogview.run import Run

SHEET = "contact_sheet.png"
CURVES = "loss_curves.png"
REPORT = "report.json"


@dataclass(frozen=True)
class Prompt:
    """One thing to draw: a digit under a held-out phrasing, the n-th time."""

    text: str
    digit: int
    phrasing: str
    draw: int


def all_prompts(draws: int) -> list[Prompt]:
    """Every digit under every held-out phrasing, ``draws`` times."""
    return [
        Prompt(phrase(template, digit), digit, template, draw)
        for draw in range(draws)
        for template in HELD_OUT_PHRASINGS
        for digit in range(10)
    ]


@dataclass(frozen=True)
class Drawings:
    """P prompts with M candidates each, in the order drawn."""

    prompts: list[Prompt]
    images: Tensor  # [P, M, 3, S, S] in [0, 1]
    losses: Tensor  # [P, M] CapLoss
    seen: Tensor  # [P, M] the digit that the judge reads

    @property
    def is_right(self) -> Tensor:
        """bool ``[P, M]``: the judge reads the digit that was asked for."""
        return self.seen == torch.tensor([prompt.digit for prompt in self.prompts])[:, None]

    @property
    def order(self) -> Tensor:
        """``[P, M]``: candidates by CapLoss, best first."""
        return self.losses.argsort(dim=1, stable=True)


def drawings_report(drawings: Drawings) -> dict[str, Any]:
    """Scores over all prompts and by phrasing.

    ``best_of_all`` is the share of prompts whose best candidate by CapLoss shows the right digit,
    ``single_draw`` the share of all candidates that do: what one unranked draw can expect.
    """
    is_right, order = drawings.is_right, drawings.order
    by_phrasing = {}
    for template in HELD_OUT_PHRASINGS:
        rows = torch.tensor([prompt.phrasing == template for prompt in drawings.prompts])
        by_phrasing[template] = _score(is_right[rows], order[rows])
    return {"results": _score(is_right, order), "by_phrasing": by_phrasing}


def prompts_report(drawings: Drawings) -> list[dict[str, Any]]:
    """Prompt by prompt: what its best candidate shows, and how many candidates are right."""
    is_right, order = drawings.is_right, drawings.order
    return [
        {
            "text": prompt.text,
            "digit": prompt.digit,
            "draw": prompt.draw,
            "best_shows": int(drawings.seen[row, order[row, 0]]),
            "best_cap_loss": round(drawings.losses[row, order[row, 0]].item(), 4),
            "right_candidates": int(is_right[row].sum()),
        }
        for row, prompt in enumerate(drawings.prompts)
    ]


def run_report(run: Run, judge: Judge) -> dict[str, Any]:
    """What the run makes of real scans that no training saw, and the size of its vocabulary."""
    return {
        "reconstruction_of_held_out_scans": _reconstruction(run, judge),
        "reading_of_held_out_scans": _reading(run),
        "judge": {
            "classifier": "support vector machine on the real training scans",
            "accuracy_on_real_test_scans": judge.test_accuracy,
        },
        "vocabulary": {"ids": run.tokenizers.vocab.size, "rows": run.tokenizers.vocab.padded_size},
    }


def environment(device: str) -> dict[str, Any]:
    """Versions and machine, to be quoted beside the times."""
    packages = ("torch", "numpy", "scikit-learn", "sentencepiece", "safetensors")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": platform.machine(),
        "system": platform.system(),
        "device": device,
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _score(is_right: Tensor, order: Tensor) -> dict[str, float]:
    best = is_right.gather(1, order[:, :1])
    return {
        "prompts": len(is_right),
        "best_of_all": best.double().mean().item(),
        "single_draw": is_right.double().mean().item(),
    }


def _reconstruction(run: Run, judge: Judge) -> dict[str, float]:
    """How well the image tokenizer keeps scans it was not trained on."""
    test = DigitPairs("test")
    tokenizer = run.tokenizers.image
    images = torch.stack([test.image(index, tokenizer.config.image_size) for index in range(len(test))])
    device = tokenizer.mean.device
    codes = tokenizer.encode(images.to(device))
    rebuilt = tokenizer.decode(codes).cpu()
    mse = F.mse_loss(rebuilt, images).item()
    return {
        "scans": len(test),
        "mse": round(mse, 6),
        "psnr_db": round(-10 * math.log10(mse), 2),
        "judge_accuracy_on_reconstructions": (judge(rebuilt) == test.labels).double().mean().item(),
        "codes_used": len(codes.unique()),
    }


def _reading(run: Run) -> dict[str, Any]:
    """How often CapLoss picks the right digit for a real scan that no training saw."""
    test = DigitPairs("test")
    tokenizer = run.tokenizers.image
    images = torch.stack([test.image(index, tokenizer.config.image_size) for index in range(len(test))])
    codes = tokenizer.encode(images.to(tokenizer.mean.device)).flatten(1)
    texts = [run.tokenizers.text.encode(phrase(HELD_OUT_PHRASINGS[0], digit)) for digit in range(10)]
    losses = caption_loss(run.model, run.tokenizers.vocab, codes.repeat_interleave(10, 0), texts * len(codes))
    accuracy = (losses.view(-1, 10).argmin(1).cpu() == test.labels).double().mean().item()
    return {"scans": len(test), "phrasing": HELD_OUT_PHRASINGS[0], "accuracy": accuracy}


def summary(report: dict[str, Any], out: Path) -> str:
    """What the command prints at the end."""
    results, seconds = report["results"], report["timings"]["seconds"]
    judge = report["judge"]["accuracy_on_real_test_scans"]
    rebuilt, reading = report["reconstruction_of_held_out_scans"], report["reading_of_held_out_scans"]
    candidates = report["settings"]["num_candidates"]
    phases = ", ".join(f"{name.replace('_', ' ')} {value:.0f} s" for name, value in seconds.items())
    return "\n".join(
        [
            f"prompts in phrasings never seen in training: {results['prompts']}, {candidates} drawings each",
            f"  best of {candidates} by CapLoss is the right digit   {results['best_of_all']:.1%}",
            f"  a single unranked drawing is               {results['single_draw']:.1%}",
            f"judge, on real scans it never saw:           {judge:.1%}",
            f"held-out scans through the image tokenizer:  PSNR {rebuilt['psnr_db']:.1f} dB, "
            f"judge reads {rebuilt['judge_accuracy_on_reconstructions']:.1%}",
            f"held-out scans read by the model itself:     {reading['accuracy']:.1%}",
            f"time: {report['timings']['total_seconds']:.0f} s ({phases})",
            f"written: {out / SHEET}, {out / CURVES}, {out / REPORT}",
        ]
    )
