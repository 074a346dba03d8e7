# SPDX-License-Identifier: Apache-2.0
"""What ``cogview evaluate`` asks of a run: to draw a set's captions, to describe its pictures, CapLoss."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from cogview.data.caption_files import CAPTION_LISTS, read_captions
from cogview.data.folder import FolderPairs
from cogview.data.image_files import picture_files
from cogview.evaluation.caption_match import CaptionMatch, match_captions
from cogview.files import StrPath, write_bytes, write_text
from cogview.generation.engine import DrawOptions
from cogview.images import png_bytes
from cogview.progress import Progress
from cogview.run import MAX_BATCH, READ_TOGETHER, Drawing, Run
from cogview.seeding import derive_seed
from cogview.settings import claim_settings

DRAWN, DRAWN_SETTINGS = "drawn", "drawn.json"
REBUILT = "rebuilt"


@dataclass(frozen=True)
class RunTask:
    """What a run is asked to draw and describe."""

    data: StrPath  # folder of pictures with captions
    out: StrPath  # the pictures go to its folder ``drawn``
    candidates: int = 1  # pictures of each caption, of which the best by CapLoss is taken
    captions: int | None = None  # at most; None: the first caption of each picture
    seed: int = 0
    skip_bad: bool = False
    progress: bool = True

    def pairs(self) -> tuple[FolderPairs, int]:
        """The pictures with captions, and how many of them count."""
        pairs = FolderPairs(self.data, skip_bad=self.skip_bad)
        return pairs, min(len(pairs), self.captions or len(pairs))


@dataclass(frozen=True)
class DrawnSettings:
    """What the pictures in ``drawn`` were drawn with: others would not be the same set."""

    weights: str  # fingerprint of the run's
    captions: list[str]
    candidates: int
    seed: int


def draw_captions(run: Run, weights: str, task: RunTask) -> Path:
    """A picture of each caption, the best of its candidates, as a folder of PNG files with their captions.

    ``weights`` is the fingerprint of the run's. Pictures that an interrupted call has drawn are kept.
    ValueError if they were drawn with other settings.
    """
    pairs, count = task.pairs()
    texts = [pairs.captions(index)[0] for index in range(count)]
    folder = Path(task.out) / DRAWN
    settings = DrawnSettings(weights, texts, task.candidates, task.seed)
    name = "another run A: weights"
    claim_settings(Path(task.out) / DRAWN_SETTINGS, settings, {"weights": name, "candidates": "--num"})
    paths = [folder / f"{place:06d}.png" for place in range(count)]
    missing = [place for place, path in enumerate(paths) if not path.exists()]
    together = max(1, MAX_BATCH // task.candidates)
    bar = Progress(count, "draw", unit="image", initial=count - len(missing), enabled=task.progress)
    with bar:
        for start in range(0, len(missing), together):
            places = missing[start : start + together]
            for place, drawing in zip(places, _best(run, texts, places, task), strict=True):
                write_bytes(paths[place], png_bytes(drawing.image, {"prompt": drawing.text}))
            bar.update(len(places))
    listed = {path.name: text for path, text in zip(paths, texts, strict=True)}
    write_text(folder / "captions.json", json.dumps(listed, ensure_ascii=False, indent=0))
    return folder


def rebuild_pictures(run: Run, task: RunTask) -> Path:
    """The pictures through the image tokenizer and back, as a folder: no drawing can be better."""
    files = picture_files(task.data)[: task.captions]
    folder = Path(task.out) / REBUILT
    with Progress(len(files), "rebuild", unit="image", enabled=task.progress) as bar:
        for start in range(0, len(files), READ_TOGETHER):
            chunk = files[start : start + READ_TOGETHER]
            for file, picture in zip(chunk, run.decode(run.encode(list(chunk))), strict=True):
                write_bytes(folder / _rebuilt_name(file, task), png_bytes(picture))
            bar.update(len(chunk))
    captions = read_captions(Path(task.data)) if _has_captions(Path(task.data)) else {}
    names = {file.relative_to(task.data).as_posix(): _rebuilt_name(file, task) for file in files}
    listed = {names[name]: texts for name, texts in captions.items() if name in names}
    if listed:
        write_text(folder / "captions.json", json.dumps(listed, ensure_ascii=False, indent=0))
    return folder


def _rebuilt_name(file: Path, task: RunTask) -> str:
    return f"{file.relative_to(task.data).as_posix()}.png"


def _has_captions(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CAPTION_LISTS)


def _best(run: Run, texts: list[str], places: list[int], task: RunTask) -> list[Drawing]:
    """The best drawing for each place, whose seed depends on nothing but the place."""
    seeds = [derive_seed(task.seed, place) for place in places]
    requests = run.requests([texts[place] for place in places], seeds)
    best: dict[int, Drawing] = {}
    options = DrawOptions(run.sampling, max_batch=MAX_BATCH)
    for number, drawing in itertools.chain.from_iterable(run.draw(requests, task.candidates, options)):
        if number not in best or drawing.loss < best[number].loss:
            best[number] = drawing
    return [best[number] for number in range(len(places))]


def describe_pictures(run: Run, task: RunTask) -> CaptionMatch:
    """How the run's own captions match those that the pictures were given."""
    pairs, count = task.pairs()
    files = [pairs.folder / pairs.name(index) for index in range(count)]
    said = []
    with Progress(count, "describe", unit="image", enabled=task.progress) as bar:
        for caption in run.describe(files):
            said.append(caption.text)
            bar.update()
    return match_captions(said, [pairs.captions(index) for index in range(count)])


def mean_cap_loss(run: Run, folder: Path, *, progress: bool = True) -> float | None:
    """CapLoss of the first caption of each picture, on average; None for a set without captions."""
    if not _has_captions(folder):
        return None
    captions = read_captions(folder)
    files = [file for file in picture_files(folder) if file.relative_to(folder).as_posix() in captions]
    losses: list[float] = []
    with Progress(len(files), f"CapLoss of {folder.name}", unit="image", enabled=progress) as bar:
        for start in range(0, len(files), READ_TOGETHER):
            chunk = files[start : start + READ_TOGETHER]
            texts = [captions[file.relative_to(folder).as_posix()][0] for file in chunk]
            losses += run.cap_loss(texts, chunk)
            bar.update(len(chunk))
    return statistics.fmean(losses) if losses else None
