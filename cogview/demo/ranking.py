# SPDX-License-Identifier: Apache-2.0
"""The rank curve of a run on the digits: draw many candidates of each prompt, rank, judge, compare."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from cogview.data.digits import DigitPairs
from cogview.demo.judge import Judge
from cogview.demo.plots import save_rank_curve
from cogview.demo.report import Prompt, all_prompts
from cogview.device import default_device
from cogview.evaluation.cap_loss import caption_loss
from cogview.evaluation.features import EfficientNetLite0Features, Features
from cogview.evaluation.frechet import FeatureStatistics, frechet_distance
from cogview.evaluation.rank_curve import COUNTS, CurvePoint, costs_of_pickers, rank_curve
from cogview.files import StrPath, load_tensors, save_tensors, write_json, write_text
from cogview.generation.engine import DrawOptions
from cogview.generation.text_to_image import generate_codes
from cogview.progress import Progress
from cogview.run import MAX_BATCH, Run, load_run
from cogview.seeding import derive_seed
from cogview.settings import claim_settings, load_tokenizer_settings
from cogview.tokens.tokenizers import fingerprint_tokenizers
from cogview.training.start import Start

CURVE = "rank_curve"  # .png, .csv and .json
SETTINGS = "rank_curve_settings.json"
DRAWS = "draws"


@dataclass(frozen=True)
class Ranking:
    """What is drawn and ranked. ``captioner`` is a run that ranks as well, finetuned from ``run``."""

    run: StrPath
    out: StrPath
    captioner: StrPath | None = None
    candidates: int = 60  # of each prompt, as in the paper
    draws: int = 2  # times that every prompt is drawn; 10 digits x 6 phrasings x 2 = 120 prompts
    seed: int = 0
    device: str = field(default_factory=default_device)
    progress: bool = True


@dataclass(frozen=True)
class RankingSettings:
    """What the candidates in a folder were drawn with."""

    weights: str  # fingerprint of the run's
    candidates: int
    draws: int
    seed: int


def study_ranking(options: Ranking, network: Features | None = None) -> list[CurvePoint]:
    """Draw, rank, judge; ``out`` then has the curve as plot, CSV and JSON. What is drawn is drawn once.

    Args:
        network: gives the features of the distance; None takes EfficientNet-Lite0.

    Raises:
        ValueError: a run that has not learned the digits, which is what the judge knows; a captioner with
            other tokenizers; a folder that was started with other settings.
    """
    out = Path(options.out)
    data = load_tokenizer_settings(options.run).data
    if data != "digits":
        raise ValueError(f"run must be one on the digits, which the judge can read, got one on {data}")
    tokenizers = fingerprint_tokenizers(options.run)
    if options.captioner is not None and fingerprint_tokenizers(options.captioner) != tokenizers:
        raise ValueError(
            f"captioner must have the tokenizers of {options.run}, {options.captioner} has others"
        )
    run = load_run(options.run, options.device)
    weights = Start(options.run, tokenizers).fingerprint
    claim_settings(out / SETTINGS, RankingSettings(weights, options.candidates, options.draws, options.seed))
    prompts = all_prompts(options.draws)
    codes = _candidates(options, run, prompts)
    losses = {"CapLoss": _losses(run, prompts, codes)}
    if options.captioner is not None:
        captioner = load_run(options.captioner, options.device)
        losses["CapLoss of the captioner"] = _losses(captioner, prompts, codes)
    is_right = _is_right(run, prompts, codes)
    distance = _Distance(run, codes, network or EfficientNetLite0Features().to(options.device))
    costs = costs_of_pickers(losses, is_right, options.seed)
    points = len(costs) * sum(count <= options.candidates for count in COUNTS)
    with Progress(points, "rank curve", unit="point", enabled=options.progress) as bar:
        curve = rank_curve(costs, is_right, distance, tell=bar.update)
    _write(out, curve, len(prompts), distance.network.distance)
    return curve


def _candidates(options: Ranking, run: Run, prompts: Sequence[Prompt]) -> Tensor:
    """Codes ``[P, M, num_codes]``; each draw of all prompts is a file, so that it is made once."""
    codes = []
    total = len(prompts) * options.candidates * run.num_codes
    with Progress(total, "draw", unit="code", enabled=options.progress) as bar:
        for draw in range(options.draws):
            path = Path(options.out) / DRAWS / f"draw-{draw}.safetensors"
            texts = [run.pieces(prompt.text) for prompt in prompts if prompt.draw == draw]
            if path.exists():
                bar.update(len(texts) * options.candidates * run.num_codes)
            else:
                drawn = generate_codes(
                    run.model,
                    run.tokenizers.vocab,
                    texts,
                    run.num_codes,
                    num_candidates=options.candidates,
                    seeds=[derive_seed(options.seed, "ranking", draw, place) for place in range(len(texts))],
                    options=DrawOptions(run.sampling, max_batch=MAX_BATCH, on_step=bar.update),
                )
                save_tensors(path, {"codes": drawn})
            codes.append(load_tensors(path)["codes"])
    return torch.cat(codes)


def _losses(run: Run, prompts: Sequence[Prompt], codes: Tensor) -> Tensor:
    """CapLoss ``[P, M]``."""
    losses = [
        caption_loss(run.model, run.tokenizers.vocab, own, [run.pieces(prompt.text)] * len(own)).cpu()
        for prompt, own in zip(prompts, codes, strict=True)
    ]
    return torch.stack(losses)


def _is_right(run: Run, prompts: Sequence[Prompt], codes: Tensor) -> Tensor:
    judge = Judge()
    seen = torch.stack([judge(run.pixels(own).cpu()) for own in codes])
    return seen == torch.tensor([prompt.digit for prompt in prompts])[:, None]


class _Distance:
    """The Frechet distance between picks and the real scans that the run was trained on."""

    def __init__(self, run: Run, codes: Tensor, network: Features) -> None:
        self.run, self.codes, self.network = run, codes, network
        pairs, size = DigitPairs("train"), run.tokenizers.image.config.image_size
        self.real = FeatureStatistics(network.width)
        for start in range(0, len(pairs), MAX_BATCH):
            numbers = range(start, min(start + MAX_BATCH, len(pairs)))
            self.real.update(self._features(torch.stack([pairs.image(number, size) for number in numbers])))

    def _features(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([self.network(part.to(self.codes.device)) for part in images.split(32)])

    def __call__(self, places: Tensor) -> float:
        picked = FeatureStatistics(self.network.width)
        codes = self.codes[torch.arange(len(places)), places]
        picked.update(self._features(self.run.pixels(codes)))
        return frechet_distance(self.real, picked)


def _write(out: Path, curve: Sequence[CurvePoint], prompts: int, distance: str) -> None:
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(["picker", "candidates", "right", distance])
    table.writerows([*point[:2], f"{point.right:.6g}", f"{point.distance:.6g}"] for point in curve)
    write_text(out / f"{CURVE}.csv", rows.getvalue())
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
