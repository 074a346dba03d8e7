# SPDX-License-Identifier: Apache-2.0
"""Whether runs draw in the style that "cogview finetune style" teaches, on drawings never shown in it.

Asked for are the emoji that training saw in colour alone, "of line drawing style". A run before its
finetuning and after it can be compared, and the bound is told: what the image tokenizer keeps of the real
line drawings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from cogview.data.emoji import ATTRIBUTION, EmojiPairs, EmojiPicture, article, held_out_lines, pictures
from cogview.demo.plots import Row, save_contact_sheet
from cogview.demo.run import DrawnWith, DrawPlan, draw_prompts, fingerprint_run, said_as
from cogview.device import default_device
from cogview.evaluation.emoji_judge import NearestPicture
from cogview.files import StrPath, write_json
from cogview.run import Run, load_run
from cogview.settings import claim_settings
from cogview.tokens.tokenizers import require_each_once, require_same_tokenizers
from cogview.training.finetune import STYLE_CAPTION

STYLE = STYLE_CAPTION.removeprefix("a picture ")
SHEET_ROWS = 16


@dataclass(frozen=True)
class StyleStudy:
    """What :func:`study_style` does."""

    runs: Sequence[StrPath]
    out: StrPath
    candidates: int = 4  # of each prompt
    prompts: int | None = None  # None: all
    seed: int = 0
    device: str = field(default_factory=default_device)
    progress: bool = True


@dataclass(frozen=True)
class StylePrompt:
    """A drawing that training saw in colour alone, asked for as lines."""

    picture: EmojiPicture
    draw: int = 0  # all of them are drawn together

    @property
    def text(self) -> str:
        """Such as "a tiger of line drawing style"."""
        name = self.picture.drawing.en
        return f"{article(name)}{name} {STYLE}"


@dataclass(frozen=True)
class StyleReading:
    """What the judge reads in N pictures."""

    is_line: Tensor  # bool [N]
    is_drawing: Tensor  # bool [N]: the drawing is the one that was asked for

    def shares(self) -> dict[str, float]:
        """Shares of pictures that are lines, that are the right drawing, and both."""
        found = {"line": self.is_line, "drawing": self.is_drawing, "both": self.is_line & self.is_drawing}
        return {name: is_right.double().mean().item() for name, is_right in found.items()}


class StyleJudge:
    """Reads the style by the saturation, and the drawing by the nearest real picture in either style.

    Where colour ends and lines begin is halfway between the mean saturations of real pictures of both styles.
    """

    def __init__(self, size: int) -> None:
        known = [picture for picture in pictures() if picture.tone is None]
        images = EmojiPairs(known).images(size)
        is_line = torch.tensor([picture.style == "line" for picture in known])
        found = _saturation(images)
        self.limit = ((found[is_line].mean() + found[~is_line].mean()) / 2).item()
        self.accuracy = ((found < self.limit) == is_line).double().mean().item()
        self._places = {drawing: place for place, drawing in enumerate({p.drawing: None for p in known})}
        self._shown = torch.tensor([self._places[picture.drawing] for picture in known])
        self._nearest = NearestPicture(images)

    def __call__(self, images: Tensor, asked: Sequence[EmojiPicture]) -> StyleReading:
        """Read ``[N, 3, S, S]`` in [0, 1], of which each was to show the drawing of ``asked``."""
        wanted = torch.tensor([self._places[picture.drawing] for picture in asked])
        return StyleReading(_saturation(images) < self.limit, self._shown[self._nearest(images)] == wanted)


def _saturation(images: Tensor) -> Tensor:
    """Mean difference between a pixel's largest and smallest channel, ``[N]``."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def study_style(options: StyleStudy) -> dict[str, Any]:
    """Draw, judge; returns the report. What is drawn is drawn once.

    Texts that are longer than a run takes are left out, and counted. Writes ``style.json`` and
    ``style.png``: for some drawings what is real in both styles, and what each run makes of them.

    Raises:
        ValueError: a run named twice; runs with different tokenizers; codes in ``out`` that were drawn with
            other settings; and what :func:`cogview.load_run` raises.
    """
    out = Path(options.out)
    require_each_once("--runs", options.runs)
    runs = {str(folder): load_run(folder, options.device) for folder in options.runs}
    require_same_tokenizers("--runs", options.runs)
    first = next(iter(runs.values()))
    every_prompt = [StylePrompt(picture) for picture in held_out_lines().pictures[: options.prompts]]
    prompts = [prompt for prompt in every_prompt if _fits(prompt, runs.values())]
    asked = [prompt.picture for prompt in prompts]
    judge = StyleJudge(first.image_size)
    lines = EmojiPairs(asked).images(first.image_size)
    kept = first.pixels(first.tokenizers.image.encode(lines.to(options.device)).flatten(1)).cpu()
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "too_long": len(every_prompt) - len(prompts),
        "candidates": options.candidates,
        "style_accuracy_of_the_judge": judge.accuracy,
        "real": judge(lines, asked).shares(),
        "codes_of_the_real": judge(kept, asked).shares(),
        "runs": {},
        "attribution": ATTRIBUTION,
    }
    shown = [(lines, torch.ones(len(lines), dtype=torch.bool))]
    for place, (folder, run) in enumerate(runs.items()):
        codes = _drawn(folder, run, prompts, options, out / f"run-{place}")
        images = torch.stack([run.pixels(own).cpu() for own in codes])
        each = [picture for picture in asked for _ in range(options.candidates)]
        best = judge(images[:, 0], asked)
        every = judge(images.flatten(0, 1), each)
        report["runs"][folder] = {"best_of_all": best.shares(), "single_draw": every.shares()}
        shown.append((images[:, 0], best.is_line & best.is_drawing))
    write_json(out / "style.json", report)
    _save_sheet(out / "style.png", asked, shown, list(runs))
    return report


def _fits(prompt: StylePrompt, runs: Iterable[Run]) -> bool:
    """Names of some drawings are longer than the captions of training."""
    return all(len(run.tokenizers.text.encode(prompt.text)) <= run.max_text_tokens for run in runs)


def _drawn(folder: str, run: Run, prompts: Sequence[StylePrompt], options: StyleStudy, out: Path) -> Tensor:
    """Codes ``[P, M, N]``, those of a prompt best first by CapLoss."""
    texts = [prompt.text for prompt in prompts]
    drawn_with = DrawnWith(fingerprint_run(folder), options.candidates, texts, options.seed)
    claim_settings(out / "settings.json", drawn_with, said_as("run of --runs", folder))
    plan = DrawPlan(out, options.seed, options.candidates, options.progress)
    codes, losses = draw_prompts(plan, run, prompts)
    return codes.gather(1, losses.argsort(dim=1, stable=True)[..., None].expand_as(codes))


def _save_sheet(
    path: Path, asked: Sequence[EmojiPicture], shown: Sequence[tuple[Tensor, Tensor]], runs: list[str]
) -> None:
    """Some drawings in colour and, column by column, what is shown of them: pictures, and which are right."""
    size = shown[0][0].shape[-1]
    coloured = {picture.drawing: picture for picture in pictures() if picture.style == "color"}
    rows = []
    for place in range(0, len(asked), -(-len(asked) // SHEET_ROWS)):
        colour = EmojiPairs([coloured[asked[place].drawing]]).images(size)
        images = torch.cat([colour, *(column[place][None] for column, _ in shown)])
        is_right = torch.tensor([True, *(bool(right[place]) for _, right in shown)])
        rows.append(Row(asked[place].drawing.en, images, is_right))
    columns = ["colour", "line", *(str(place + 1) for place in range(len(runs)))]
    names = ", ".join(f"{place + 1} {Path(run).name}" for place, run in enumerate(runs))
    title = f'"... {STYLE}" of drawings never shown so: real, then the best by CapLoss of {names}'
    save_contact_sheet(path, title, rows, columns, "no lines, or another drawing", "run")


def style_table(report: Mapping[str, Any]) -> str:
    """What the command prints."""
    kinds = {"real line drawings": report["real"], "their codes": report["codes_of_the_real"]}
    for run, found in report["runs"].items():
        kinds[f"{run}, best of {report['candidates']}"] = found["best_of_all"]
        kinds[f"{run}, single draw"] = found["single_draw"]
    rows = [
        {"pictures": name, **{aspect: f"{share:.1%}" for aspect, share in shares.items()}}
        for name, shares in kinds.items()
    ]
    accuracy = report["style_accuracy_of_the_judge"]
    told = f"{report['prompts']} prompts; the judge reads the style of {accuracy:.1%} of real pictures right"
    return "\n".join([tabulate(rows, headers="keys"), told, report["attribution"]])
