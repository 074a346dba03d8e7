# SPDX-License-Identifier: Apache-2.0
"""CogView on handwritten digits, from raw scans to reranked drawings, in minutes on two CPU cores.

Phases: train the tokenizers, train the transformer on rows of both orders, draw 16 candidates for every
prompt, rerank them by CapLoss with the same model, let a judge read them. All prompts are in phrasings
that training never saw. Each phase picks up where an interrupted run stopped.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cogview.commands import decode_codes
from cogview.config import Preset
from cogview.data.digits import ENGLISH, HELD_OUT_PHRASINGS, TRAINING_PHRASINGS, DigitPairs, Judge, phrase
from cogview.device import default_device
from cogview.evaluation.rerank import rerank
from cogview.files import load_tensors, read_json, save_tensors, write_json
from cogview.generation.captions import caption_loss
from cogview.generation.text_to_image import generate_codes
from cogview.images import save_contact_sheet, save_loss_curves
from cogview.presets import PRESETS
from cogview.run import Run, load_run
from cogview.seeding import derive_seed
from cogview.settings import claim_settings, plain
from cogview.training.pipeline import TrainModel, TrainTokenizers, train_model, train_tokenizers

SHEET = "contact_sheet.png"
CURVES = "loss_curves.png"
REPORT = "report.json"


@dataclass(frozen=True)
class Demo:
    """What the demo does. The defaults are what the command runs."""

    out: Path = Path("runs/demo")
    seed: int = 0
    preset: Preset = PRESETS["digits"]
    num_candidates: int = 16
    draws: int = 4  # times every prompt is drawn anew; 10 digits x 6 phrasings x 4 = 240 prompts
    device: str = field(default_factory=default_device)
    progress: bool = True


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


def _draw(options: Demo, run: Run, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Codes ``[prompts, candidates, num_codes]`` and CapLoss; a finished draw is read from its file."""
    codes, losses = [], []
    num_codes = run.tokenizers.image.config.codes_per_image
    total = len(prompts) * options.num_candidates
    with tqdm(total=total, desc="draw and rerank", unit="image", disable=not options.progress) as bar:
        for draw in range(options.draws):
            texts = [run.tokenizers.text.encode(prompt.text) for prompt in prompts if prompt.draw == draw]
            path = options.out / "draws" / f"draw-{draw}.safetensors"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                drawn = generate_codes(
                    run.model,
                    run.tokenizers.vocab,
                    texts,
                    num_codes,
                    num_candidates=options.num_candidates,
                    sampling=run.sampling,
                    seed=derive_seed(options.seed, "draw", draw),
                    max_batch=512,
                )
                loss = rerank(run.model, run.tokenizers.vocab, texts, drawn)[1]
                save_tensors(path, {"codes": drawn, "losses": loss})
            saved = load_tensors(path)
            codes.append(saved["codes"])
            losses.append(saved["losses"])
            bar.update(len(texts) * options.num_candidates)
    return torch.cat(codes), torch.cat(losses)


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
        "psnr_db": round(-10 * torch.log10(torch.tensor(mse)).item(), 2),
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


def _environment(device: str) -> dict[str, Any]:
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


def run_demo(options: Demo) -> dict[str, Any]:
    """Train, draw, rerank, judge; writes pictures and ``report.json`` to ``out`` and returns the report.

    In the report ``best_of_all`` is the share of prompts whose best candidate by CapLoss shows the right
    digit, ``single_draw`` the share of all candidates that do: what one unranked draw can expect.
    """
    out = options.out
    preset = dataclasses.replace(
        options.preset,
        train=dataclasses.replace(options.preset.train, seed=options.seed),
        image_tokenizer_train=dataclasses.replace(options.preset.image_tokenizer_train, seed=options.seed),
    )
    settings = {
        "seed": options.seed,
        "num_candidates": options.num_candidates,
        "draws": options.draws,
        "preset": preset,
        "training_phrasings": TRAINING_PHRASINGS,
        "held_out_phrasings": HELD_OUT_PHRASINGS,
    }
    claim_settings(out / "demo.json", settings)
    clock = PhaseClock(out / "timings.json")
    common: dict[str, Any] = {
        "data": "digits",
        "out": out,
        "preset": preset,
        "device": options.device,
        "progress": options.progress,
    }
    with clock.phase("train_tokenizers"):
        tokenizer_history = train_tokenizers(TrainTokenizers(**common))
    with clock.phase("train_model"):
        history = train_model(TrainModel(**common))
    run = load_run(out, options.device)
    prompts = all_prompts(options.draws)
    with clock.phase("draw_and_rerank"):
        codes, losses = _draw(options, run, prompts)
    with clock.phase("judge_and_report"):
        judge = Judge()
        digits = torch.tensor([prompt.digit for prompt in prompts])
        images = decode_codes(run, codes.to(options.device)).cpu()
        seen = judge(images.flatten(0, 1)).view(len(prompts), options.num_candidates)
        is_right = seen == digits[:, None]
        order = losses.argsort(dim=1, stable=True)
        report: dict[str, Any] = {
            "seed": options.seed,
            "results": _score(is_right, order),
            "by_phrasing": {},
            "reconstruction_of_held_out_scans": _reconstruction(run, judge),
            "reading_of_held_out_scans": _reading(run),
            "judge": {
                "classifier": "support vector machine on the real training scans",
                "accuracy_on_real_test_scans": judge.test_accuracy,
            },
            "model_parameters": run.model.num_parameters(),
            "vocabulary": {"ids": run.tokenizers.vocab.size, "rows": run.tokenizers.vocab.padded_size},
            "final_losses": {name: sum(values[-50:]) / len(values[-50:]) for name, values in history.items()},
            "settings": settings,
            "environment": _environment(options.device),
        }
        for template in HELD_OUT_PHRASINGS:
            rows = torch.tensor([prompt.phrasing == template for prompt in prompts])
            report["by_phrasing"][template] = _score(is_right[rows], order[rows])
        report["prompts"] = [
            {
                "text": prompt.text,
                "digit": prompt.digit,
                "draw": prompt.draw,
                "best_shows": int(seen[row, order[row, 0]]),
                "best_cap_loss": round(losses[row, order[row, 0]].item(), 4),
                "right_candidates": int(is_right[row].sum()),
            }
            for row, prompt in enumerate(prompts)
        ]
        _save_pictures(out, report, images, is_right, order, history, tokenizer_history)
    report["timings"] = {**clock.timings, "total_seconds": round(sum(clock.timings["seconds"].values()), 2)}
    write_json(out / REPORT, plain(report))
    return report


def _save_pictures(
    out: Path,
    report: dict[str, Any],
    images: Tensor,
    is_right: Tensor,
    order: Tensor,
    history: dict[str, list[float]],
    tokenizer_history: dict[str, list[float]],
) -> None:
    """The first draw of the first English and the first Chinese held-out phrasing, and the losses."""
    rows: list[int] = []
    labels: list[str] = []
    english = HELD_OUT_PHRASINGS[0]
    chinese = next(template for template in HELD_OUT_PHRASINGS if "{zh}" in template)
    for template in (english, chinese):
        first = HELD_OUT_PHRASINGS.index(template) * 10
        rows += range(first, first + 10)
        # Fonts without Chinese glyphs are common, so a Chinese prompt is labelled by its meaning.
        gloss = "{en}  (asked in Chinese)" if template == chinese else "{en}"
        labels += [gloss.format(en=word) for word in ENGLISH]
    best_first = order[rows]
    sheet = images[rows].gather(1, best_first[..., None, None, None].expand_as(images[rows]))
    results = report["results"]
    best, single = results["best_of_all"], results["single_draw"]
    title = (
        f'"{english.format(en="...")}" and a Chinese phrasing, neither seen in training.  '
        f"Right digit over {results['prompts']} prompts: "
        f"best of {images.shape[1]} by CapLoss {best:.1%}, single draw {single:.1%}"
    )
    save_contact_sheet(out / SHEET, title, labels, sheet, is_right[rows].gather(1, best_first))
    panels = {
        "transformer: cross-entropy (nats per token)": {
            "image tokens": history["image_loss"],
            "text tokens": history["text_loss"],
        },
        "image tokenizer: pixel error": {"mean squared error": tokenizer_history["reconstruction"]},
    }
    save_loss_curves(out / CURVES, panels)


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
