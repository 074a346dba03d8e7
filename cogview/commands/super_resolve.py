# SPDX-License-Identifier: Apache-2.0
"""What ``cogview super-resolve`` does: enlarge, write, and compare with other ways to enlarge."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview import options
from cogview.commands.outlet import SHEET, Outlet
from cogview.data.image_files import pixels_of
from cogview.evaluation.enlargement import bicubic, peak_signal_to_noise, seam_contrast
from cogview.generation.engine import DrawOptions
from cogview.generation.super_resolution import drawn_by
from cogview.progress import Progress
from cogview.run import Run, load_run

TASKS = ("super-resolution", "local-super-resolution")


def super_resolve(given: options.SuperResolve) -> None:
    """Enlarge the pictures of the command line and write them."""
    outlet = Outlet(given.out, given.force)
    if outlet.folder is not None:
        _require_names([path.stem for path in given.images])
    run = load_run(given.run, given.device, given.precision)
    if run.finetuned_for not in TASKS:
        raise ValueError(
            f"{given.run or 'the run that ships'} never learned to enlarge; cogview finetune "
            "super-resolution --run RUN --data DATA --out RUN2, or local-super-resolution, makes one that has"
        )
    size = run.image_size if given.from_half else 2 * run.image_size
    outlet.check_size([len(given.images)], size)
    small: list[Path] | list[Tensor] = list(given.images)
    truth = None
    if given.compare:
        truth = torch.stack([pixels_of(path, size) for path in given.images])
        small = list(F.avg_pool2d(truth, 2))
    sampling = run.sampling
    if given.temperature is not None:
        sampling = dataclasses.replace(sampling, temperature=given.temperature)
    side = run.tokenizers.image.config.grid
    low = side // 2 if given.from_half else side
    is_local = run.finetuned_for == "local-super-resolution"
    with Progress(len(small) * run.codes_to_enlarge(given.from_half), "enlarge", unit="code") as bar:
        drawing = DrawOptions(
            sampling, max_batch=given.max_batch, parallel=given.parallel, on_step=bar.update
        )
        pictures = run.enlarge(small, given.text or None, drawing, from_half=given.from_half, seed=given.seed)
    about = {"prompt": given.text, "seed": given.seed}
    for path, picture in zip(given.images, pictures, strict=True):
        outlet.write_picture(path.stem, picture, about)
    outlet.write_sheet([pictures], about)
    if truth is not None:
        enlarged = torch.stack([pixels_of(picture, size) for picture in pictures])
        windows = torch.zeros(1, 1) if is_local else drawn_by(low, side)
        _print_comparison(run, truth, enlarged, windows)
    if not outlet.is_standard_output:
        print(f"written: {outlet.name}")


def _require_names(stems: Sequence[str]) -> None:
    """ValueError where one of the files that are written to a folder would replace another."""
    for place, stem in enumerate(stems):
        if f"{stem}.png" == SHEET or stem in stems[:place]:
            taken = "the sheet has" if f"{stem}.png" == SHEET else "another picture has"
            raise ValueError(
                f"--out: a picture would be written as {stem}.png, a name that {taken}; rename it"
            )


def _print_comparison(run: Run, truth: Tensor, enlarged: Tensor, windows: Tensor) -> None:
    """Mean PSNR of the pictures, of bicubic scaling, and of what the image tokenizer keeps of the truth."""
    kept = kept_of(run, truth)
    ways = {"enlarged": enlarged, "bicubic": bicubic(F.avg_pool2d(truth, 2)), "codes of the truth": kept}
    print("PSNR: " + ", ".join(f"{name} {peak_signal_to_noise(x, truth):.2f} dB" for name, x in ways.items()))
    if bool(windows.any()):
        contrast = seam_contrast(enlarged, windows) / seam_contrast(kept, windows)
        print(f"steps across the windows' edges: {contrast:.2f} times those in the codes of the truth")


def kept_of(run: Run, truth: Tensor) -> Tensor:
    """What the image tokenizer keeps of pictures: nothing that draws codes comes nearer."""
    tokenizer = run.tokenizers.image
    return tokenizer.decode(tokenizer.encode(truth.to(tokenizer.mean))).to(truth)
