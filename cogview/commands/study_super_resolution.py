# SPDX-License-Identifier: Apache-2.0
"""Ways to enlarge, compared: CogView's sliding window, CogView2's local attention, bicubic scaling.

Runs of ``cogview finetune super-resolution`` and ``local-super-resolution`` enlarge the same pictures, which
no training saw. Of each are told the distance from the truth in pixels and in a network's features, the
time and the memory.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from cogview.commands.super_resolve import TASKS, kept_of
from cogview.data.digits import DigitPairs
from cogview.data.emoji import held_out_combinations
from cogview.data.image_files import pixels_of
from cogview.data.pairs import Pairs
from cogview.device import default_device
from cogview.evaluation.enlargement import bicubic, peak_signal_to_noise
from cogview.evaluation.likeness import Likeness
from cogview.files import StrPath, write_json
from cogview.images import picture_grid, save_figure, save_overview, to_picture
from cogview.run import Run, load_run
from cogview.tokens.tokenizers import require_each_once, require_same_tokenizers

HELD_OUT: dict[str, Callable[[], Pairs]] = {
    "small": partial(DigitPairs, "test"),
    "paper": held_out_combinations,
}
SHOWN = 12  # pictures on the sheet
MEASURES = {
    "psnr_db": "PSNR (dB)",
    "feature_distance": "1 - cosine of features",
    "sharpness": "sharpness (1 = real)",
    "seconds_a_picture": "seconds a picture",
    "extra_mb": "extra memory (MB)",
}
Enlarge = Callable[[Sequence[Tensor], Sequence[str]], Tensor]


@dataclass(frozen=True)
class SuperResolutionStudy:
    """What :func:`study_super_resolution` does."""

    runs: Sequence[StrPath]
    out: StrPath
    size: Literal["small", "paper"] = "small"  # which pictures: scans of digits, or drawings of OpenMoji
    pictures: int = 64  # at most
    device: str = field(default_factory=default_device)


def study_super_resolution(options: SuperResolutionStudy) -> list[dict[str, Any]]:
    """Enlarge held-out pictures in every way; returns one record each.

    A picture is shrunk to the runs' size, and enlarged to twice that with its own caption. Writes
    ``super-resolution.json``, a plot, and a sheet: the truth, then what each way makes of it.

    Raises:
        ValueError: a run is named twice, was not finetuned to enlarge, or has other tokenizers than the
            first; and what :func:`cogview.load_run` raises.
    """
    runs = _load_all(options.runs, options.device)
    first = next(iter(runs.values()))
    pairs = HELD_OUT[options.size]()
    chosen = range(0, len(pairs), -(-len(pairs) // options.pictures))
    truth = torch.stack([pairs.image(index, 2 * first.image_size) for index in chosen])
    texts = [pairs.captions(index)[0] for index in chosen]
    small, device = list(F.avg_pool2d(truth, 2)), torch.device(options.device)
    ways: dict[str, Enlarge] = {"bicubic": lambda small, texts: bicubic(torch.stack(list(small)))}
    for folder, run in runs.items():
        ways[f"{run.finetuned_for}, {folder}"] = partial(_drawn, run)
    likeness = Likeness(truth)
    records: list[dict[str, Any]] = []
    rows = [truth]
    for way, enlarge in ways.items():
        enlarge(small[:1], texts[:1])  # What is done once alone is not timed.
        enlarged, seconds, extra_mb = _measure(partial(enlarge, small, texts), device)
        records.append({"way": way, "seconds_a_picture": seconds / len(small), "extra_mb": extra_mb})
        rows.append(enlarged)
    records.append({"way": "codes of the truth"})
    rows.append(kept_of(first, truth))
    for record, pictures in zip(records, rows[1:], strict=True):
        record |= {"psnr_db": peak_signal_to_noise(pictures, truth), **likeness(pictures)}
    _write(Path(options.out), records, rows, len(truth))
    return records


def _load_all(folders: Sequence[StrPath], device: str) -> dict[str, Run]:
    require_each_once("--runs", folders)
    runs = {str(folder): load_run(folder, device) for folder in folders}
    for folder, run in runs.items():
        if run.finetuned_for not in TASKS:
            raise ValueError(
                f"--runs must be of cogview finetune super-resolution or local-super-resolution, got {folder}"
            )
    require_same_tokenizers("--runs", folders)
    return runs


def _drawn(run: Run, small: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
    pictures = run.super_resolve(list(small), texts)
    return torch.stack([pixels_of(picture, 2 * run.image_size) for picture in pictures])


def _measure(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float, float | None]:
    """What ``work`` gives, its seconds, and the megabytes that it held at most beyond what was held before.

    On a CPU, Linux tells of the memory that was resident, right to about a megabyte; elsewhere it is None.
    """
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: float | None = torch.cuda.memory_allocated(device) / 1e6
    else:
        before = _resident_mb("VmRSS")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # The peak becomes what is resident now.
    started = time.perf_counter()
    enlarged = work()  # It comes back to the CPU, so that nothing is under way any more.
    seconds = time.perf_counter() - started
    most = torch.cuda.max_memory_allocated(device) / 1e6 if is_cuda else _resident_mb("VmHWM")
    return enlarged, seconds, None if before is None or most is None else max(0.0, most - before)


def _resident_mb(name: str) -> float | None:
    try:
        found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024 / 1e6


def _write(out: Path, records: Sequence[Mapping[str, Any]], rows: Sequence[Tensor], count: int) -> None:
    write_json(out / "super-resolution.json", {"pictures": count, "ways": records})
    stride = -(-count // SHOWN)
    sheet = picture_grid([[to_picture(image) for image in images[::stride]] for images in rows])
    save_overview(out / "super-resolution-sheet.png", sheet)
    _save_plot(out / "super-resolution.png", records)


def _save_plot(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """A bar for each way: likeness, time, memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 3.5), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    axes[0].invert_yaxis()
    for axis, (name, title) in zip(axes, MEASURES.items(), strict=True):
        axis.barh([record["way"] for record in records], [record.get(name) or 0 for record in records])
        axis.set_title(title)
        axis.grid(alpha=0.3, axis="x")
    save_figure(path, figure)


def super_resolution_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as text."""
    names = {"way": "way", **MEASURES}
    rows = [{title: record.get(name) for name, title in names.items()} for record in records]
    return tabulate(rows, headers="keys", floatfmt=".4g")
