# SPDX-License-Identifier: Apache-2.0
"""How well runs of CLIP-GEN, which never read a caption, draw what they are asked for in words.

Prompts and judge are those of the demo of the emoji. The candidates are ranked by CLIP, and by a CogView that
was trained on captions if one is given; that one draws the same prompts as well, to compare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from cogview.clip_gen_run import ClipGenRun, costs_of_ranks, load_clip_gen
from cogview.data.emoji import ATTRIBUTION, EmojiPairs
from cogview.demo.emoji import (
    GROUPS,
    EmojiPrompt,
    JudgedDrawings,
    all_prompts,
    judge_drawings,
    judge_report,
    save_sheet,
)
from cogview.demo.plots import save_picks_plot
from cogview.demo.report import REPORT, SHEET
from cogview.demo.run import DrawnWith, DrawPlan, draw_prompts, fingerprint_run, said_as
from cogview.device import default_device
from cogview.evaluation.emoji_judge import EmojiJudge
from cogview.evaluation.retrieval import embedding_gap, gap_in_words
from cogview.files import StrPath, exists, load_tensors, save_tensors, write_json
from cogview.generation.clip_gen import draw_from_embeddings
from cogview.generation.engine import DrawOptions
from cogview.perception.clip import Clip, embed_images
from cogview.progress import Progress
from cogview.run import Run, load_run, require_num
from cogview.settings import claim_settings

# Held-out combinations of drawing and tone, and pictures that training saw. The demo's third group is Chinese
# by half, which the small CLIP does not read.
ASKED = (GROUPS[0], GROUPS[2])
ASPECTS = ("tone", "drawing", "both")  # of a drawing, of which the judge says whether it is right
CHANCE = "chance"
PICKS = "picks.png"
TOGETHER = 16  # prompts whose codes are drawn, and kept, together


@dataclass(frozen=True)
class ClipGenJudging:
    """What :func:`judge_clip_gen` does."""

    runs: tuple[StrPath, ...]
    out: StrPath
    captioner: StrPath | None = None  # a CogView that tells CapLoss, and draws the same prompts
    clip: StrPath | None = None  # where the CLIP of the runs lies now; None: where it lay in training
    candidates: int = 16  # of each prompt
    prompts_of_a_group: int | None = None  # None: all
    seed: int = 0
    device: str = field(default_factory=default_device)
    progress: bool = True


@dataclass(frozen=True)
class Drawer:
    """A run that draws, be it a CLIP-GEN or a CogView."""

    name: str
    about: dict[str, Any]  # for the report
    weights: str  # fingerprint
    size: int  # of its pictures, in pixels
    clip: Clip  # that ranks them
    # ``draw(plan, prompts=prompts)`` gives codes [P, M, N], and CapLoss [P, M] where it is known at once.
    draw: Callable[..., tuple[Tensor, Tensor | None]]
    pixels: Callable[[Tensor], Tensor]  # codes [M, N] to [M, 3, S, S]


class Ranked(NamedTuple):
    """P prompts with M candidates each."""

    images: Tensor  # [P, M, 3, S, S]
    costs: dict[str, Tensor]  # by rank, [P, M]


def judge_clip_gen(options: ClipGenJudging) -> dict[str, Any]:
    """Draw, rank, judge; returns the report.

    Codes are kept in ``runs/NAME/draws`` below ``out``, so that an interrupted call goes on where it stopped,
    and runs can be added. At the end writes ``report.json``, ``picks.png`` (the shares of right picks) and,
    beside the codes of each run, a sheet of its drawings, best first by CLIP.

    Raises:
        FileNotFoundError, ValueError: a folder that holds no such run; a CLIP of another width, or another
            one than in training; two runs of one name; codes in ``out`` that were drawn with other weights,
            prompts or seed, or as another number of candidates.
    """
    require_num(options.candidates, "candidates")
    out = Path(options.out)
    _require_names(options)
    prompts = [prompt for prompt in all_prompts(options.prompts_of_a_group) if prompt.group in ASKED]
    drawers = [_clip_gen(folder, options) for folder in options.runs]
    captioner = None
    if options.captioner is not None:
        captioner = load_run(options.captioner, options.device)
        drawers.append(_cogview(options.captioner, captioner, drawers[0].clip))
    for drawer in drawers:
        _claim(drawer, prompts, options)
    judges = {size: EmojiJudge(size) for size in dict.fromkeys(drawer.size for drawer in drawers)}
    records = []
    for drawer in drawers:
        ranked = _ranked(drawer, prompts, captioner, options)
        drawings = judge_drawings(judges[drawer.size], prompts, ranked.images, ranked.costs["clip"])
        sheet = _folder(out, drawer) / SHEET
        save_sheet(sheet, drawings, drawings.scores(GROUPS[0]), "the cosine of CLIP")
        results = {group: _picks(drawings, ranked.costs, group) for group in ASKED}
        gaps = {group: _gap(drawer, prompts, group, options.device) for group in ASKED}
        records.append({"run": drawer.name, **drawer.about, "results": results, "embeddings": gaps})
    report = {
        "runs": records,
        "candidates": options.candidates,
        "seed": options.seed,
        "judge": {str(size): judge_report(judge) for size, judge in judges.items()},
        "attribution": ATTRIBUTION,
    }
    save_picks_plot(out / PICKS, _by_group(records))
    write_json(out / REPORT, report)
    return report


def _require_names(options: ClipGenJudging) -> None:
    """A run is known by the name of its folder. ValueError if two have one name."""
    folders = [*options.runs, *([] if options.captioner is None else [options.captioner])]
    names = [_name(folder) for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"runs must have folders of different names, got two named {name}; rename one")


def _name(folder: StrPath) -> str:
    return Path(folder).resolve().name


def _folder(out: Path, drawer: Drawer) -> Path:
    return out / "runs" / drawer.name


def _clip_gen(folder: StrPath, options: ClipGenJudging) -> Drawer:
    run = load_clip_gen(folder, options.device, options.clip)
    train = run.settings.train
    about = {
        "kind": "CLIP-GEN",
        "steps": train.steps,
        "embedding_loss": train.embedding_loss,
        "embedding_noise": train.embedding_noise,
    }
    size, draw = run.tokenizer.config.image_size, partial(draw_codes, run=run)
    return Drawer(_name(folder), about, run.fingerprint, size, run.clip, draw, run.decode)


def _cogview(folder: StrPath, run: Run, clip: Clip) -> Drawer:
    weights, draw = fingerprint_run(folder), partial(draw_prompts, run=run)
    return Drawer(_name(folder), {"kind": "CogView"}, weights, run.image_size, clip, draw, run.pixels)


def draw_codes(plan: DrawPlan, run: ClipGenRun, prompts: Sequence[EmojiPrompt]) -> tuple[Tensor, None]:
    """Codes ``[prompts, candidates, num_codes]``; what a file in ``plan.out`` holds is not drawn again."""
    embeddings = run.clip.of_texts([prompt.text for prompt in prompts])
    num_codes = run.tokenizer.config.codes_per_image
    codes = []
    total = len(prompts) * plan.num_candidates * num_codes
    with Progress(total, "draw by CLIP-GEN", unit="code", enabled=plan.progress) as bar:
        options = DrawOptions(run.sampling, plan.seed, on_step=bar.update)
        for start in range(0, len(prompts), TOGETHER):
            part = embeddings[start : start + TOGETHER]
            path = Path(plan.out) / "draws" / f"prompts-{start:04d}.safetensors"
            if exists(path):
                bar.update(len(part) * plan.num_candidates * num_codes)
            else:
                drawn = draw_from_embeddings(run.model, part, plan.num_candidates, options)
                rows = torch.cat([batch.codes for batch in drawn])
                save_tensors(path, {"codes": rows.view(len(part), plan.num_candidates, num_codes)})
            codes.append(load_tensors(path)["codes"])
    return torch.cat(codes), None


def _claim(drawer: Drawer, prompts: list[EmojiPrompt], options: ClipGenJudging) -> None:
    """ValueError if the codes in the run's folder were drawn otherwise: told before the judge is made."""
    texts = [prompt.text for prompt in prompts]
    drawn_with = DrawnWith(drawer.weights, options.candidates, texts, options.seed)
    name = said_as("run of this name", drawer.name)
    claim_settings(_folder(Path(options.out), drawer) / "settings.json", drawn_with, name)


def _ranked(
    drawer: Drawer, prompts: list[EmojiPrompt], captioner: Run | None, options: ClipGenJudging
) -> Ranked:
    """What a run draws, with the costs of all ranks; a CogView's own codes have their own CapLoss."""
    texts = [prompt.text for prompt in prompts]
    folder = _folder(Path(options.out), drawer)
    plan = DrawPlan(folder, options.seed, options.candidates, options.progress)
    codes, losses = drawer.draw(plan, prompts=prompts)
    images, cosines, told = [], [], []
    embeddings = drawer.clip.of_texts(texts).cpu()
    with Progress(len(texts), f"rank {drawer.name}", unit="prompt", enabled=options.progress) as bar:
        for text, embedding, own in zip(texts, embeddings, codes, strict=True):
            pixels = drawer.pixels(own)
            cosines.append(embed_images(drawer.clip, pixels, options.device) @ embedding)
            images.append(pixels.cpu())
            if losses is None and captioner is not None:
                cap_losses = captioner.cap_loss(text, list(images[-1]))
                told.append(torch.tensor(cap_losses, dtype=torch.float32))
            bar.update()
    costs = costs_of_ranks(torch.stack(cosines), torch.stack(told) if told else losses)
    return Ranked(torch.stack(images), {str(rank): cost for rank, cost in costs.items()})


def _picks(drawings: JudgedDrawings, costs: dict[str, Tensor], group: str) -> dict[str, Any]:
    """Shares of right picks among the prompts of a group that the judge can read, by picker and aspect.

    Chance is what one draw can expect.
    """
    scores = {rank: dataclasses.replace(drawings, costs=cost).scores(group) for rank, cost in costs.items()}
    picks = {
        rank: {aspect: found[aspect]["best_of_all"] for aspect in ASPECTS} for rank, found in scores.items()
    }
    any_rank = scores["clip"]
    picks[CHANCE] = {aspect: any_rank[aspect]["single_draw"] for aspect in ASPECTS}
    return {"prompts": any_rank["prompts"], "picks": picks}


def _gap(drawer: Drawer, prompts: list[EmojiPrompt], group: str, device: str) -> dict[str, float]:
    """Between the texts of a group and the real pictures that they describe, for the CLIP that ranks."""
    chosen = [prompt for prompt in prompts if prompt.group == group]
    pictures = EmojiPairs([prompt.picture for prompt in chosen]).images(drawer.size)
    texts = drawer.clip.of_texts([prompt.text for prompt in chosen]).cpu()
    return embedding_gap(embed_images(drawer.clip, pictures, device), texts)


def _by_group(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The picks as the plot takes them."""
    return {
        f"{group}, {records[0]['results'][group]['prompts']} prompts": {
            record["run"]: record["results"][group]["picks"] for record in records
        }
        for group in ASKED
    }


def clip_gen_table(report: dict[str, Any]) -> str:
    """What the command prints: for each run and group the shares of right picks, then the embedding gap."""
    rows = [
        {
            "run": record["run"],
            "second loss": record.get("embedding_loss", "-"),
            "prompts": f"{record['results'][group]['prompts']} {group}",
            **{
                picker: ", ".join(f"{shares[aspect]:.1%}" for aspect in ASPECTS)
                for picker, shares in record["results"][group]["picks"].items()
            },
        }
        for record in report["runs"]
        for group in ASKED
    ]
    lines = [
        f"tone, drawing and both right, of {report['candidates']} candidates as each picker chooses:",
        tabulate(rows, headers="keys"),
    ]
    for record in report["runs"]:
        for group, found in record["embeddings"].items():
            lines.append(f"{record['run']}, real pictures of {group}: {gap_in_words(found)}")
    return "\n".join([*lines, report["attribution"]])
