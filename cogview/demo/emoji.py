# SPDX-License-Identifier: Apache-2.0
"""CogView on OpenMoji's drawings: trained, then asked for combinations and phrasings that it never saw.

The phases are those of every demo (:mod:`cogview.demo.run`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.config import Preset
from cogview.data.emoji import (
    ATTRIBUTION,
    HELD_OUT_PHRASINGS,
    TRAINING_PHRASINGS,
    EmojiPairs,
    EmojiPicture,
    held_out_combinations,
    training_pairs,
)
from cogview.demo.plots import Row, save_contact_sheet
from cogview.demo.report import CURVES, REPORT, SHEET
from cogview.demo.run import Subject, run_phases, seeded
from cogview.device import default_device
from cogview.evaluation.emoji_judge import EmojiJudge, Reading
from cogview.files import StrPath
from cogview.presets import PRESETS
from cogview.run import Run

# What is asked for: held-out combinations in a phrasing of training, the same in phrasings that are held out
# too (English and Chinese in turn), and pictures that training saw, to compare with.
GROUPS = ("combinations", "phrasings", "training")
KNOWN_EVERY = 16  # one in so many of the toned training pictures is asked for
SHEET_ROWS, SHEET_COLUMNS = 24, 12


@dataclass(frozen=True)
class EmojiDemo:
    """What the demo does. The defaults are what the command runs."""

    out: StrPath = Path("runs/pictures")
    seed: int = 0
    preset: Preset = PRESETS["emoji"]
    num_candidates: int = 16
    prompts_of_a_group: int | None = None  # None: all
    device: str = field(default_factory=default_device)
    progress: bool = True


@dataclass(frozen=True)
class EmojiDemoSettings:
    """What a demo was started with, ``demo.json`` in its folder."""

    data: str
    seed: int
    num_candidates: int
    prompts_of_a_group: int | None
    preset: Preset


@dataclass(frozen=True)
class EmojiPrompt:
    """One thing to draw."""

    text: str
    group: str
    picture: EmojiPicture  # the real one that the text describes

    @property
    def draw(self) -> int:
        """The groups are drawn one after another."""
        return GROUPS.index(self.group)


def all_prompts(most: int | None = None) -> list[EmojiPrompt]:
    """The prompts of all groups, at most ``most`` of each."""
    held_out = held_out_combinations().pictures[:most]
    toned = [picture for picture in training_pairs().pictures if picture.tone]
    prompts = []
    for number, picture in enumerate(held_out):
        prompts.append(EmojiPrompt(_caption(picture, TRAINING_PHRASINGS["color"][1]), GROUPS[0], picture))
        phrasing = HELD_OUT_PHRASINGS["color"][number % 2]
        prompts.append(EmojiPrompt(_caption(picture, phrasing), GROUPS[1], picture))
    for picture in toned[::KNOWN_EVERY][:most]:
        prompts.append(EmojiPrompt(_caption(picture, TRAINING_PHRASINGS["color"][1]), GROUPS[2], picture))
    return sorted(prompts, key=lambda prompt: prompt.draw)


def _caption(picture: EmojiPicture, phrasing: str) -> str:
    """The picture under the phrasing, with "... with dark skin" for its tone."""
    return picture.captions([phrasing])[-1]


def run_emoji_demo(options: EmojiDemo) -> dict[str, Any]:
    """See :func:`cogview.demo.run.run_phases`; the sheet of pictures is written to ``out`` as well."""
    preset = seeded(options.preset, options.seed)
    settings = EmojiDemoSettings(
        "emoji", options.seed, options.num_candidates, options.prompts_of_a_group, preset
    )
    prompts = all_prompts(options.prompts_of_a_group)

    def judged(run: Run, codes: Tensor, losses: Tensor) -> dict[str, Any]:
        judge = EmojiJudge(preset.image_tokenizer.image_size)
        drawings = judge_drawings(judge, prompts, run.pixels(codes).cpu(), losses)
        results = {group: drawings.scores(group) for group in GROUPS}
        save_sheet(Path(options.out) / SHEET, drawings, results["combinations"])
        return {
            "results": results,
            "judge": judge_report(judge),
            "reconstruction_of_held_out_pictures": _reconstruction(run, judge),
            "attribution": ATTRIBUTION,
            "prompts": drawings.listed(),
        }

    return run_phases(options, Subject("emoji", preset, settings, prompts, judged))


@dataclass(frozen=True)
class JudgedDrawings:
    """P prompts with M candidates each, in the order drawn, and what the judge says."""

    prompts: list[EmojiPrompt]
    images: Tensor  # [P, M, 3, S, S] in [0, 1]
    costs: Tensor  # [P, M], such as CapLoss: the best candidate costs least
    tone_is_right: Tensor  # bool [P, M]
    drawing_is_right: Tensor  # bool [P, M]
    readable: Tensor  # bool [P]: the judge reads the real picture right, so that it can tell

    @property
    def order(self) -> Tensor:
        """``[P, M]``: candidates by their costs, best first."""
        return self.costs.argsort(dim=1, stable=True)

    def scores(self, group: str) -> dict[str, Any]:
        """Shares of a group's readable prompts: the candidate that costs least, and any one of them.

        ``single_draw`` is also what a pick at random can expect, so their difference is what ranking gains.
        """
        rows = torch.tensor([prompt.group == group for prompt in self.prompts]) & self.readable
        scores: dict[str, Any] = {"prompts": int(rows.sum())}
        right = {
            "tone": self.tone_is_right,
            "drawing": self.drawing_is_right,
            "both": self.tone_is_right & self.drawing_is_right,
        }
        for name, is_right in right.items():
            best = is_right[rows].gather(1, self.order[rows, :1])
            scores[name] = {
                "best_of_all": best.double().mean().item(),
                "single_draw": is_right[rows].double().mean().item(),
            }
        return scores

    def listed(self) -> list[dict[str, Any]]:
        """Prompt by prompt: whether the best candidate is right, and how many are."""
        best = self.order[:, 0]
        return [
            {
                "text": prompt.text,
                "group": prompt.group,
                "picture": prompt.picture.name,
                "readable": bool(self.readable[row]),
                "best_has_the_tone": bool(self.tone_is_right[row, best[row]]),
                "best_has_the_drawing": bool(self.drawing_is_right[row, best[row]]),
                "candidates_with_the_tone": int(self.tone_is_right[row].sum()),
                "candidates_with_the_drawing": int(self.drawing_is_right[row].sum()),
            }
            for row, prompt in enumerate(self.prompts)
        ]


def judge_drawings(
    judge: EmojiJudge, prompts: list[EmojiPrompt], images: Tensor, costs: Tensor
) -> JudgedDrawings:
    """What the judge says of images ``[P, M, 3, S, S]``, of which each has a cost."""
    found = judge(images.flatten(0, 1))
    pairs = EmojiPairs([prompt.picture for prompt in prompts])
    expected = judge.expected(pairs)
    tone = found.tones.view(costs.shape) == expected.tones[:, None]
    drawing = found.drawings.view(costs.shape) == expected.drawings[:, None]
    return JudgedDrawings(prompts, images, costs, tone, drawing, _both_right(judge.real(pairs), expected))


def _both_right(found: Reading, expected: Reading) -> Tensor:
    return (found.tones == expected.tones) & (found.drawings == expected.drawings)


def judge_report(judge: EmojiJudge) -> dict[str, Any]:
    """The judge on real pictures that neither it nor any training has seen."""
    found, expected = judge.real(), judge.expected(held_out_combinations())
    return {
        "tone": "logistic regression on how many pixels are near each fill of skin",
        "drawing": "the nearest real training picture in feature maps of EfficientNet-Lite0",
        "drawings_to_choose_from": len(judge.drawings),
        "real_held_out_pictures": len(found.tones),
        "tone_accuracy": (found.tones == expected.tones).double().mean().item(),
        "drawing_accuracy": (found.drawings == expected.drawings).double().mean().item(),
        "both_right": int(_both_right(found, expected).sum()),
    }


def _reconstruction(run: Run, judge: EmojiJudge) -> dict[str, Any]:
    """How well the image tokenizer keeps held-out combinations; shares of those that the judge can read."""
    pairs, tokenizer = held_out_combinations(), run.tokenizers.image
    images = pairs.images(tokenizer.config.image_size)
    codes = tokenizer.encode(images.to(tokenizer.mean.device))
    rebuilt = tokenizer.decode(codes).cpu()
    expected = judge.expected(pairs)
    readable = _both_right(judge(images), expected)
    found = judge(rebuilt)
    mse = F.mse_loss(rebuilt, images).item()
    return {
        "pictures": len(pairs),
        "readable": int(readable.sum()),
        "mse": round(mse, 6),
        "psnr_db": round(-10 * math.log10(mse), 2),
        "tone": (found.tones == expected.tones)[readable].double().mean().item(),
        "drawing": (found.drawings == expected.drawings)[readable].double().mean().item(),
        "codes_used": len(codes.unique()),
    }


def save_sheet(
    path: Path, drawings: JudgedDrawings, scores: dict[str, Any], ranked_by: str = "CapLoss"
) -> None:
    """Held-out combinations, evenly chosen: the real picture, then the best candidates."""
    places = [
        place
        for place, prompt in enumerate(drawings.prompts)
        if prompt.group == GROUPS[0] and drawings.readable[place]
    ]
    size = drawings.images.shape[-1]
    rows = []
    for place in places[:: max(1, -(-len(places) // SHEET_ROWS))]:
        best = drawings.order[place, :SHEET_COLUMNS]
        real = EmojiPairs([drawings.prompts[place].picture]).images(size)
        is_right = (drawings.tone_is_right & drawings.drawing_is_right)[place, best]
        images = torch.cat([real, drawings.images[place, best]])
        label = drawings.prompts[place].picture.name
        rows.append(Row(label, images, torch.cat([torch.ones(1, dtype=torch.bool), is_right])))
    num, prompts = drawings.images.shape[1], scores["prompts"]
    tone, drawing = (scores[aspect]["best_of_all"] for aspect in ("tone", "drawing"))
    title = (
        f"Drawings in skin tones never seen together in training.  Of {prompts} prompts, best of {num} by "
        f"{ranked_by}: tone {tone:.0%}, drawing {drawing:.0%}"
    )
    if rows:
        columns = ["real", *(str(rank + 1) for rank in range(len(rows[0].images) - 1))]
        order = f"rank by {ranked_by}, best first"
        save_contact_sheet(path, title, rows, columns, "another drawing or another tone", order)


def summary(report: dict[str, Any], out: Path) -> str:
    """What the command prints at the end."""
    judge, rebuilt = report["judge"], report["reconstruction_of_held_out_pictures"]
    candidates = report["settings"]["num_candidates"]
    lines = [
        f"judge, on {judge['real_held_out_pictures']} real held-out pictures: "
        f"tone {judge['tone_accuracy']:.1%}, "
        f"drawing {judge['drawing_accuracy']:.1%} of {judge['drawings_to_choose_from']}",
        f"held-out pictures through the image tokenizer: PSNR {rebuilt['psnr_db']:.1f} dB, "
        f"tone {rebuilt['tone']:.1%}, drawing {rebuilt['drawing']:.1%}",
    ]
    for group in GROUPS:
        scores = report["results"][group]
        found = ", ".join(
            f"{name} {scores[name]['best_of_all']:.1%} ({scores[name]['single_draw']:.1%})"
            for name in ("tone", "drawing", "both")
        )
        lines.append(f"{group}: {scores['prompts']} prompts, best of {candidates} (one draw): {found}")
    seconds = report["timings"]["seconds"]
    phases = ", ".join(f"{name.replace('_', ' ')} {value:.0f} s" for name, value in seconds.items())
    lines.append(f"time: {report['timings']['total_seconds']:.0f} s ({phases})")
    lines.append(f"written: {out / SHEET}, {out / CURVES}, {out / REPORT}")
    lines.append(report["attribution"])
    return "\n".join(lines)
