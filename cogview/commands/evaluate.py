# SPDX-License-Identifier: Apache-2.0
"""What ``cogview evaluate`` does: compare two sets of pictures, or what a run draws with a set.

Source: CogView (arXiv:2105.13290), section 4.1 and Table 1: Frechet distances with both sets blurred,
Inception Score, CapLoss. A set is a folder of pictures or the saved statistics of one. A run draws a picture
for each caption of the set that it is compared with, and describes the pictures of that set.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path

from tabulate import tabulate

from cogview.commands.evaluate_run import (
    DRAWN,
    REBUILT,
    RunTask,
    describe_pictures,
    draw_captions,
    mean_cap_loss,
    rebuild_pictures,
)
from cogview.data.folder import listing
from cogview.device import default_device
from cogview.evaluation.evaluation_plot import save_distance_plot
from cogview.evaluation.features import Features
from cogview.evaluation.inception import InceptionFeatures
from cogview.evaluation.pictures import PictureFolder
from cogview.evaluation.set_statistics import (
    BLUR_RADII,
    STATISTICS_SUFFIX,
    SetStatistics,
    distances,
    load_statistics,
    picture_statistics,
    require_comparable,
)
from cogview.files import StrPath, exists, write_csv, write_json
from cogview.perception.efficientnet import EfficientNetLite0Features
from cogview.run import Run, load_run, require_num
from cogview.settings import MODEL_SETTINGS
from cogview.training.start import Start

FIGURES, TABLE, PLOT = "evaluation.json", "evaluation.csv", "evaluation.png"
REFERENCE = f"reference{STATISTICS_SUFFIX}"  # statistics of the second set


@dataclass(frozen=True)
class Evaluate:
    """Compare ``first``, a set of pictures or a run, with the set ``second``; results go to ``out``."""

    first: StrPath
    second: StrPath
    out: StrPath
    _: KW_ONLY
    inception: Path | None = None  # the file of weights of the FID's network; None: EfficientNet-Lite0
    radii: Sequence[float] = BLUR_RADII
    side: int | None = None  # pictures are scaled and cropped to such squares; None: they must be of one size
    scorer: StrPath | None = None  # run that gives CapLoss; None: first, if that is a run
    candidates: int = 1  # pictures that a run draws of each caption, of which the best by CapLoss is taken
    captions: int | None = None  # that a run draws, or pictures that it rebuilds, at most
    rebuild: bool = False  # a run rebuilds the pictures of second, rather than draw their captions
    seed: int = 0
    splits: int = 10  # parts of the Inception Score
    batch_size: int = 32
    skip_bad: bool = False  # leave out pictures that cannot be read
    device: str = field(default_factory=default_device)
    progress: bool = True


@dataclass(frozen=True)
class Figure:
    """One line of the results; None where there is no such number."""

    name: str
    first: float | None = None
    second: float | None = None
    between: float | None = None


def evaluate(options: Evaluate) -> list[Figure]:
    """All figures; ``out`` then holds them as CSV, JSON and plot, and the statistics of the second set.

    Raises:
        FileNotFoundError: no such set, run or file of weights.
        ValueError: a folder without pictures, or with some that cannot be read (all of them listed); sets of
            different sizes or seen by different networks; a run, and no captions to draw; ``out`` within a
            set.
    """
    require_num(options.candidates, "candidates")
    first, second = Path(options.first), Path(options.second)
    for path in (first, second):
        if not exists(path):  # before the pictures of the other are read
            raise FileNotFoundError(f"folder of pictures not found: {path}")
    _require_out_apart(options)
    network = _network(options)
    reference = _open(second, options, network)
    of_run: list[Figure] = []
    drawer = load_run(first, options.device) if exists(first / MODEL_SETTINGS) else None
    scorer = drawer if options.scorer is None else load_run(options.scorer, options.device)
    if drawer is not None:
        _require_folder_of(drawer, reference, options, network)
        first, of_run = _of_run(drawer, options)
    opened = _open(first, options, network)
    require_comparable((network.name, opened.side), (network.name, reference.side))
    sets = [_statistics(each, options, network) for each in (opened, reference)]
    figures = [*_of_sets(sets[0], sets[1], options, network), *of_run]
    if scorer is not None:
        losses = [
            mean_cap_loss(scorer, path, progress=options.progress) if path.is_dir() else None
            for path in (first, second)
        ]
        figures.append(Figure("CapLoss", *losses))
    out = Path(options.out)
    sets[1].save(out / REFERENCE)
    _write(out, options, figures)
    return figures


def _require_out_apart(options: Evaluate) -> None:
    """ValueError where what is written would count among the compared pictures, the next time at least."""
    first, second, out = Path(options.first), Path(options.second), Path(options.out)
    is_run = exists(first / MODEL_SETTINGS)
    for folder in (second,) if is_run else (first, second):
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"--out {out} lies in {folder}, whose pictures are compared, and what is written there would "
                "count among them; name a folder elsewhere with --out"
            )
    drawn = out / (REBUILT if options.rebuild else DRAWN)
    if is_run and second.resolve().is_relative_to(drawn.resolve()):
        raise ValueError(
            f"the run would draw into {drawn}, with whose pictures it is to be compared; name a folder "
            "elsewhere with --out"
        )


def _network(options: Evaluate) -> Features:
    if options.inception is not None:
        return InceptionFeatures(options.inception).to(options.device)
    return EfficientNetLite0Features().to(options.device)


def _open(path: Path, options: Evaluate, network: Features) -> PictureFolder | SetStatistics:
    """A set, with all that can be wrong with it found out."""
    if path.suffix == STATISTICS_SUFFIX:
        saved = load_statistics(path)
        require_comparable((saved.network, 0), (network.name, 0))
        return saved
    pictures = PictureFolder(path, side=options.side, skip_bad=options.skip_bad, progress=options.progress)
    if pictures.overviews:
        names = listing([os.fspath(each.relative_to(path)) for each in pictures.overviews])
        told = f"left out of {path}, as sheets or plots of cogview beside the pictures"
        print(f"{told}: {names}", file=sys.stderr)
    if pictures.left_out:
        left_out = f"{len(pictures.left_out)} pictures left out of {path}"
        print(f"{left_out}: {listing(pictures.left_out)}", file=sys.stderr)
    if len(pictures) < 2:
        raise ValueError(f"{path} has one picture, of which there is no distance; it takes two or more")
    return pictures


def _require_folder_of(
    run: Run, reference: PictureFolder | SetStatistics, options: Evaluate, network: Features
) -> None:
    """What would be wrong with what the run draws, before it draws."""
    if isinstance(reference, SetStatistics):
        raise ValueError(f"a run is compared with a folder of pictures, got the statistics {options.second}")
    if options.side is None:
        side = run.tokenizers.image.config.image_size
        require_comparable((network.name, side), (network.name, reference.side))


def _of_run(run: Run, options: Evaluate) -> tuple[Path, list[Figure]]:
    """The folder of what the run draws or rebuilds, and how well it describes the other pictures."""
    task = RunTask(
        options.second,
        options.out,
        candidates=options.candidates,
        captions=options.captions,
        seed=options.seed,
        skip_bad=options.skip_bad,
        progress=options.progress,
    )
    if options.rebuild:
        return rebuild_pictures(run, task), []
    match = describe_pictures(run, task)
    figures = [
        Figure("captions that match, share", second=match.exact),
        Figure("characters of captions that match, share", second=match.characters),
    ]
    weights = Start(options.first, run.tokenizers.fingerprint).fingerprint
    return draw_captions(run, weights, task), figures


def _statistics(opened: PictureFolder | SetStatistics, options: Evaluate, network: Features) -> SetStatistics:
    if isinstance(opened, SetStatistics):
        return opened
    return picture_statistics(
        opened,
        network,
        options.device,
        radii=options.radii,
        splits=options.splits,
        batch_size=options.batch_size,
        progress=options.progress,
    )


def _of_sets(
    first: SetStatistics, second: SetStatistics, options: Evaluate, network: Features
) -> list[Figure]:
    of_both = distances(first, second)
    missing = [radius for radius in options.radii if radius not in of_both]
    if missing:
        pixels = ", ".join(f"{radius:g}" for radius in missing)
        warnings.warn(
            f"the saved statistics have no blur of {pixels} pixels: it is left out; give the pictures "
            "themselves for it",
            stacklevel=3,
        )
    return [
        Figure("pictures", first.count, second.count),
        *(
            Figure(f"{network.distance}, blur {radius:g}", between=distance)
            for radius, distance in of_both.items()
        ),
        Figure(network.score, first.score.mean, second.score.mean),
        Figure(f"{network.score}, deviation over parts", first.score.deviation, second.score.deviation),
    ]


def _write(out: Path, options: Evaluate, figures: Sequence[Figure]) -> None:
    names = {"first": str(options.first), "second": str(options.second)}
    rows = ([figure.name, *_shown(figure)] for figure in figures)
    write_csv(out / TABLE, ["figure", *names.values(), "between"], rows)
    write_json(out / FIGURES, {**names, "figures": [asdict(figure) for figure in figures]})
    # The name of a distance ends with the radius of its blur.
    heights = {
        figure.name.rpartition(" ")[2]: figure.between for figure in figures if figure.between is not None
    }
    label = next(figure.name for figure in figures if figure.between is not None).rpartition(",")[0]
    save_distance_plot(out / PLOT, f"{options.first} against {options.second}", label, heights)


def _shown(figure: Figure) -> list[str]:
    values = (figure.first, figure.second, figure.between)
    return ["" if value is None else f"{value:.6g}" for value in values]


def evaluation_table(figures: Sequence[Figure], options: Evaluate) -> str:
    """What the command prints."""
    heads = ["", Path(options.first).name, Path(options.second).name, "between"]
    return tabulate([[figure.name, *_shown(figure)] for figure in figures], heads, disable_numparse=True)
