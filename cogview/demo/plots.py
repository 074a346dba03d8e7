# SPDX-License-Identifier: Apache-2.0
"""What the demo draws with matplotlib: a contact sheet and loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from cogview.data.digits import ENGLISH, HELD_OUT_PHRASINGS
from cogview.demo.report import Drawings
from cogview.evaluation.rank_curve import CurvePoint
from cogview.files import StrPath
from cogview.images import save_figure

RIGHT, WRONG = (0.30, 0.60, 0.40), (0.80, 0.20, 0.20)


@dataclass(frozen=True)
class Row:
    """What a contact sheet shows of one prompt."""

    label: str
    images: Tensor  # [M, 3, S, S] in [0, 1], best first
    is_right: Tensor  # bool [M]


def save_contact_sheet(
    path: StrPath,
    title: str,
    rows: Sequence[Row],
    columns: Sequence[str],
    if_wrong: str,
    order: str = "rank by CapLoss, best first",
) -> None:
    """One labelled row of candidates per prompt, in columns whose ``order`` is told.

    A wrong one is framed in red: ``if_wrong`` says why.
    """
    side = rows[0].images.shape[-1]
    factor = max(1, 48 // side)
    frame, gap = 3, 3
    cell = side * factor + 2 * frame + gap
    sheet = np.ones((len(rows) * cell, len(columns) * cell, 3))
    for place, row in enumerate(rows):
        tiles = row.images.permute(0, 2, 3, 1).cpu().numpy().repeat(factor, axis=1).repeat(factor, axis=2)
        for column, (tile, is_right) in enumerate(zip(tiles, row.is_right, strict=True)):
            block = sheet[
                place * cell : place * cell + cell - gap, column * cell : column * cell + cell - gap
            ]
            block[:] = RIGHT if is_right else WRONG
            block[frame:-frame, frame:-frame] = tile
    # Inches: a cell has 0.55, a letter of a label or of the title about 0.08.
    width = 0.55 * len(columns) + 0.08 * max(len(row.label) for row in rows)
    size = (max(width, 0.08 * len(title)) + 0.5, 0.55 * len(rows) + 1.2)
    figure = Figure(figsize=size, dpi=110, layout="compressed")  # for a fixed aspect
    axes = figure.subplots()
    axes.imshow(sheet, interpolation="nearest", aspect="equal")
    heights = [(place + 0.5) * cell for place in range(len(rows))]
    axes.set_yticks(heights, [row.label for row in rows], fontsize=10)
    axes.set_xticks([(column + 0.5) * cell for column in range(len(columns))], columns, fontsize=9)
    axes.tick_params(length=0)
    axes.set_xlabel(f"{order} (red frame: the judge reads {if_wrong})")
    axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11)
    save_figure(path, figure)


def _running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Of the last ``width`` values, without those of skipped steps that are not finite; NaN where none is."""
    numbers = np.asarray(values, dtype=float)
    finite = np.isfinite(numbers)
    total = np.cumsum(np.concatenate([[0.0], np.where(finite, numbers, 0.0)]))
    count = np.cumsum(np.concatenate([[0], finite]))
    last = np.arange(1, len(numbers) + 1)
    first = np.maximum(last - width, 0)
    with np.errstate(invalid="ignore"):
        return (total[last] - total[first]) / (count[last] - count[first])


def save_loss_curves(path: StrPath, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """One panel per title, one labelled curve per entry, over steps, with running means on top."""
    figure = Figure(figsize=(5.5 * len(panels), 3.8), dpi=110, layout="constrained")
    for axes, (title, curves) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True
    ):
        for index, (label, values) in enumerate(curves.items()):
            steps = np.arange(1, len(values) + 1)
            axes.plot(steps, values, color=f"C{index}", alpha=0.25, linewidth=0.8)
            axes.plot(steps, _running_mean(values, 25), color=f"C{index}", linewidth=1.6, label=label)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    save_figure(path, figure)


def save_demo_sheet(path: StrPath, drawings: Drawings, results: Mapping[str, float]) -> None:
    """The first draw of the first English and of the first Chinese held-out phrasing."""
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
    images, best_first = drawings.images, drawings.order[rows]
    sheet = images[rows].gather(1, best_first[..., None, None, None].expand_as(images[rows]))
    is_right = drawings.is_right[rows].gather(1, best_first)
    shown = [Row(*row) for row in zip(labels, sheet, is_right, strict=True)]
    columns = [str(rank + 1) for rank in range(images.shape[1])]
    best, single = results["best_of_all"], results["single_draw"]
    title = (
        f'"{english.format(en="...")}" and a Chinese phrasing, neither seen in training.  '
        f"Right digit over {results['prompts']} prompts: "
        f"best of {images.shape[1]} by CapLoss {best:.1%}, single draw {single:.1%}"
    )
    save_contact_sheet(path, title, shown, columns, "another digit")


def save_rank_curve(path: StrPath, curve: Sequence[CurvePoint], prompts: int, distance: str) -> None:
    """The share of picks that are right, and their Frechet distance, over the number of candidates."""
    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    right, far = figure.subplots(1, 2)
    for picker in dict.fromkeys(point.picker for point in curve):
        own = [point for point in curve if point.picker == picker]
        counts = [point.candidates for point in own]
        right.plot(counts, [100 * point.right for point in own], "o-", label=picker)
        far.plot(counts, [point.distance for point in own], "o-", label=picker)
    right.set_ylabel(f"picks that are right, % of {prompts} prompts")
    far.set_ylabel(distance)
    counts = sorted({point.candidates for point in curve})
    for axes in (right, far):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("candidates of which one is picked")
        axes.grid(alpha=0.3)
    right.legend()
    save_figure(path, figure)


def save_picks_plot(
    path: StrPath, groups: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
) -> None:
    """The share of picks that are right: a row of panels for each group of prompts, a panel for each aspect.

    ``groups[title][run][picker][aspect]``: the runs are side by side, a bar for each picker.
    """
    first = next(iter(groups.values()))
    runs, pickers = list(first), list(next(iter(first.values())))
    aspects = list(first[runs[0]][pickers[0]])
    figure = Figure(
        figsize=(4.2 * len(aspects), 3.6 * len(groups)),
        dpi=110,
        layout="constrained",
    )
    panels = figure.subplots(len(groups), len(aspects), squeeze=False)
    width = 0.8 / len(pickers)
    for row, (title, picks) in zip(panels, groups.items(), strict=True):
        for axes, aspect in zip(row, aspects, strict=True):
            for number, picker in enumerate(pickers):
                places = [place - 0.4 + (number + 0.5) * width for place in range(len(runs))]
                axes.bar(places, [100 * picks[run][picker][aspect] for run in runs], width, label=picker)
            axes.set_xticks(range(len(runs)), runs)
            axes.set_ylim(0, 100)
            axes.set_title(f"{aspect}: {title}")
            axes.grid(alpha=0.3, axis="y")
        row[0].set_ylabel("picks that are right, %")
    # Inside a panel it would hide bars, which may be as high as the panel.
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(pickers))
    save_figure(path, figure)


def save_demo_curves(
    path: StrPath, history: Mapping[str, Sequence[float]], tokenizer_history: Mapping[str, Sequence[float]]
) -> None:
    """The losses of the transformer and of the image tokenizer."""
    panels = {
        "transformer: cross-entropy (nats per token)": {
            "image tokens": history["image_loss"],
            "text tokens": history["text_loss"],
        },
        "image tokenizer: pixel error": {"mean squared error": tokenizer_history["reconstruction"]},
    }
    save_loss_curves(path, panels)
