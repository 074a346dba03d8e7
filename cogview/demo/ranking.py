# SPDX-License-Identifier: Apache-2.0
"""The rank curve of a run: draw many candidates of each prompt, rank them, judge them, compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from cogview.demo.plots import save_rank_curve
from cogview.demo.quiz import Quiz, quiz_of
from cogview.demo.run import DrawnWith, DrawPlan, draw_prompts, fingerprint_run, said_as
from cogview.device import default_device
from cogview.evaluation.cap_loss import caption_loss
from cogview.evaluation.features import Features
from cogview.evaluation.frechet import FeatureStatistics, frechet_distance
from cogview.evaluation.rank_curve import COUNTS, CurvePoint, costs_of_pickers, rank_curve
from cogview.files import StrPath, write_csv, write_json
from cogview.perception.efficientnet import EfficientNetLite0Features
from cogview.progress import Progress
from cogview.run import Run, load_run, require_num
from cogview.settings import claim_settings, load_tokenizer_settings
from cogview.tokens.tokenizers import require_same_tokenizers

CURVE = "rank_curve"  # .png, .csv and .json
SETTINGS = "rank_curve_settings.json"
TOGETHER = 32  # pictures that the network sees at once


@dataclass(frozen=True)
class Ranking:
    """What is drawn and ranked. ``captioner`` is a run that ranks as well, finetuned from ``run``."""

    run: StrPath
    out: StrPath
    captioner: StrPath | None = None
    candidates: int = 60  # of each prompt, as in the paper
    prompts: int = 120  # at most
    seed: int = 0
    device: str = field(default_factory=default_device)
    progress: bool = True


def study_ranking(options: Ranking, network: Features | None = None) -> list[CurvePoint]:
    """Draw, rank, judge; ``out`` then has the curve as plot, CSV and JSON. What is drawn is drawn once.

    Args:
        network: gives the features of the distance; None takes EfficientNet-Lite0.

    Raises:
        ValueError: a run on data that no judge can read; a captioner with other tokenizers; a folder that was
            started with other settings.
    """
    require_num(options.candidates, "candidates")
    out = Path(options.out)
    settings = load_tokenizer_settings(options.run)
    quiz = quiz_of(settings.data, settings.image_tokenizer.image_size, options.prompts)
    run = load_run(options.run, options.device)
    if options.captioner is not None:
        require_same_tokenizers("captioner", [options.run, options.captioner])
    weights, texts = fingerprint_run(options.run), [prompt.text for prompt in quiz.prompts]
    drawn_with = DrawnWith(weights, options.candidates, texts, options.seed)
    claim_settings(out / SETTINGS, drawn_with, said_as("--run", options.run))
    plan = DrawPlan(out, options.seed, options.candidates, options.progress)
    codes, own_losses = draw_prompts(plan, run, quiz.prompts)
    losses = {"CapLoss": own_losses}
    if options.captioner is not None:
        captioner = load_run(options.captioner, options.device)
        losses["CapLoss of the captioner"] = _losses(captioner, quiz, codes, options.progress)
    is_right = _right(run, quiz, codes, options.progress)
    network = network or EfficientNetLite0Features().to(options.device)
    distance = _Distance(run, codes, quiz, network, options.progress)
    costs = costs_of_pickers(losses, is_right, options.seed)
    points = len(costs) * sum(count <= options.candidates for count in COUNTS)
    with Progress(points, "rank curve", unit="point", enabled=options.progress) as bar:
        curve = rank_curve(costs, is_right, distance, tell=bar.update)
    _write(out, curve, len(texts), distance.network.distance)
    return curve


def _losses(run: Run, quiz: Quiz, codes: Tensor, progress: bool) -> Tensor:
    """CapLoss ``[P, M]``."""
    losses = []
    with Progress(codes.shape[:2].numel(), "rank by the captioner", unit="image", enabled=progress) as bar:
        for prompt, own in zip(quiz.prompts, codes, strict=True):
            pieces = [run.pieces(prompt.text)] * len(own)
            losses.append(caption_loss(run.model, run.tokenizers.vocab, own, pieces).cpu())
            bar.update(len(own))
    return torch.stack(losses)


def _right(run: Run, quiz: Quiz, codes: Tensor, progress: bool) -> Tensor:
    """What the judge says, bool ``[P, M]``."""
    is_right = []
    with Progress(codes.shape[:2].numel(), "judge", unit="image", enabled=progress) as bar:
        for place, own in enumerate(codes):
            is_right.append(quiz.is_right(place, run.pixels(own).cpu()))
            bar.update(len(own))
    return torch.stack(is_right)


class _Distance:
    """The Frechet distance between picks and the real pictures of the quiz."""

    def __init__(self, run: Run, codes: Tensor, quiz: Quiz, network: Features, progress: bool) -> None:
        self.run, self.codes, self.network = run, codes, network
        # Pickers often agree, so the features of a candidate are kept once they are known.
        self._known = torch.zeros(codes.shape[:2], dtype=torch.bool)
        self._kept = torch.empty(*codes.shape[:2], network.width, dtype=torch.float32)
        self.real = FeatureStatistics(network.width)
        total = len(quiz.pictures)
        with Progress(total, "features of real pictures", unit="image", enabled=progress) as bar:
            for images in quiz.real():
                self.real.update(self._features(images, bar.update))

    def _features(self, images: Tensor, tell: Callable[[int], object] = lambda count: None) -> Tensor:
        device = self.run.model.word_embeddings.weight.device
        features = []
        with torch.inference_mode():
            for part in images.split(TOGETHER):
                features.append(self.network(part.to(device)))
                tell(len(part))
        return torch.cat(features)

    def __call__(self, places: Tensor) -> float:
        rows = torch.arange(len(places))
        new = rows[~self._known[rows, places]]
        if len(new):
            self._kept[new, places[new]] = self._features(self.run.pixels(self.codes[new, places[new]])).cpu()
            self._known[new, places[new]] = True
        picked = FeatureStatistics(self.network.width)
        picked.update(self._kept[rows, places])
        return frechet_distance(self.real, picked)


def _write(out: Path, curve: Sequence[CurvePoint], prompts: int, distance: str) -> None:
    rows = ([*point[:2], f"{point.right:.6g}", f"{point.distance:.6g}"] for point in curve)
    write_csv(out / f"{CURVE}.csv", ["picker", "candidates", "right", distance], rows)
    points = [point._asdict() for point in curve]
    write_json(out / f"{CURVE}.json", {"prompts": prompts, "distance": distance, "points": points})
    save_rank_curve(out / f"{CURVE}.png", curve, prompts, distance)


def ranking_table(curve: Sequence[CurvePoint]) -> str:
    """What the command prints: the share that is right and the distance, by picker and candidates."""
    counts = list(dict.fromkeys(point.candidates for point in curve))
    found = {(point.picker, point.candidates): point for point in curve}
    pickers = list(dict.fromkeys(point.picker for point in curve))
    rows = [
        [picker, *(f"{found[picker, n].right:.1%}, {found[picker, n].distance:.2f}" for n in counts)]
        for picker in pickers
    ]
    return tabulate(rows, ["right, distance", *(f"best of {count}" for count in counts)])
