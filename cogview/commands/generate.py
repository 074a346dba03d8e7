# SPDX-License-Identifier: Apache-2.0
"""What ``cogview generate`` and ``cogview infill`` do: draw, rank, write, tell."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from cogview import options
from cogview.commands.outlet import Outlet
from cogview.generation.engine import DrawOptions
from cogview.model.memory import cache_bytes, rows_that_fit, weight_bytes
from cogview.progress import Progress
from cogview.run import Drawing, Run, load_run
from cogview.terminal import in_one_line


def draw_pictures(
    given: options.Drawing, texts: Sequence[str], kept: Callable[[Run], Tensor] | None = None
) -> None:
    """Draw ``given.num`` pictures of each text and write them to ``given.out``.

    ``kept``: the codes of a picture that are kept, as :meth:`Run.kept_codes` gives them. After Ctrl-C what
    is finished is written all the same, and KeyboardInterrupt says so.
    """
    outlet = Outlet(given.out, given.force)
    run = load_run(given.run, given.device, given.precision)
    outlet.check_size([given.num] * len(texts), run.tokenizers.image.config.image_size)
    if given.guidance not in (None, 1) and not run.text_dropout:
        message = "--guidance: this run was trained without --train.text-dropout, so it may not help"
        print(f"warning: {message}", file=sys.stderr)
    asked = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p", "guidance")}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    drawer = DrawOptions(
        dataclasses.replace(run.sampling, **changes), max_batch=given.max_batch, parallel=given.parallel
    )
    started = time.perf_counter()
    memory = _memory(run, drawer, given.num * len(texts))
    if given.verbose:
        print("memory: " + ", ".join(f"{n} {b / 2**20:,.1f} MiB" for n, b in memory.items()), file=sys.stderr)
    pictures = _Pictures(outlet, texts, ranked=not given.no_rerank)
    requests = run.requests(texts, [given.seed] * len(texts), None if kept is None else kept(run))
    on_partial = pictures.show_partial if given.stream else None
    bar = Progress(len(texts) * given.num * run.num_codes, "draw", unit="code")
    with _only_one_interrupt(), bar:
        drawer = dataclasses.replace(drawer, on_step=bar.update)
        try:
            for batch in run.draw(requests, given.num, drawer, on_partial):
                for place, drawing in batch:
                    pictures.add(place, drawing)
        except KeyboardInterrupt:
            if not pictures.count:
                raise KeyboardInterrupt(
                    f"the unfinished pictures are in {given.out}" if pictures.shows_partial else ""
                ) from None
            pictures.finish()
            raise KeyboardInterrupt(
                f"{pictures.count} of {given.num * len(texts)} pictures were finished: {given.out}"
            ) from None
    pictures.finish()
    seconds = round(time.perf_counter() - started, 3)
    if given.json:
        _print_json(pictures, {"seconds": seconds, "bytes": memory})
    else:
        _print_summary(pictures, to=sys.stderr if outlet.is_standard_output else sys.stdout)


@contextlib.contextmanager
def _only_one_interrupt() -> Iterator[None]:
    """Within the block a first Ctrl-C is a KeyboardInterrupt, further ones are nothing: finished pictures get
    written."""

    def handle(signum: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not is_main or not callable(before):  # ignored, as by what a shell starts in the background
        yield
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _memory(run: Run, drawer: DrawOptions, pictures: int) -> dict[str, int]:
    weight = run.model.word_embeddings.weight
    rows = rows_that_fit(run.model.config, weight.dtype, weight.device, drawer.max_batch)
    rows = min(rows, pictures * drawer.sampling.branches)
    return {"weights": weight_bytes(run.model), "cache": cache_bytes(run.model.config, rows, weight.dtype)}


class _Pictures:
    """What is drawn so far, by text, and where it goes."""

    def __init__(self, outlet: Outlet, texts: Sequence[str], *, ranked: bool) -> None:
        self.outlet, self.texts, self.ranked = outlet, texts, ranked
        self.rows: list[list[Drawing]] = [[] for _ in texts]
        self.files: dict[tuple[int, int], Path] = {}
        self.shows_partial = False

    @property
    def count(self) -> int:
        """Pictures that are finished."""
        return sum(map(len, self.rows))

    def add(self, place: int, drawing: Drawing) -> None:
        """A finished picture of text number ``place``."""
        self.rows[place].append(drawing)
        name = f"{drawing.candidate:04d}" if len(self.texts) == 1 else f"{place + 1}-{drawing.candidate:04d}"
        about = {
            "prompt": drawing.text,
            "seed": drawing.seed,
            "candidate": drawing.candidate,
            "cap_loss": f"{drawing.loss:.4f}",
        }
        path = self.outlet.write_picture(name, drawing.image, about)
        if path is not None:
            self.files[place, drawing.candidate] = path

    def show_partial(self, partial: Sequence[tuple[int, Image.Image]]) -> None:
        """The sheet with the pictures of the batch that is being drawn."""
        groups = [[drawing.image for drawing in row] for row in self.rows]
        for place, image in partial:
            groups[place].append(image)
        self.outlet.write_sheet(groups, self._about())
        self.shows_partial = True

    def finish(self) -> None:
        """Rank, and write the sheet."""
        if self.ranked:
            self.rows = [sorted(row, key=lambda drawing: drawing.loss) for row in self.rows]
        self.outlet.write_sheet([[drawing.image for drawing in row] for row in self.rows], self._about())

    def _about(self) -> dict[str, object]:
        seeds = {drawing.seed for row in self.rows for drawing in row}
        return {"prompt": "\n".join(self.texts), "seed": ", ".join(map(str, seeds))}


def _print_summary(pictures: _Pictures, to: Any) -> None:
    order = "best first" if pictures.ranked else "in the order drawn"
    for text, row in zip(map(in_one_line, pictures.texts), pictures.rows, strict=True):
        losses = [drawing.loss for drawing in row]
        if len(row) == 1:
            print(f'"{text}": 1 picture, CapLoss {losses[0]:.3f}', file=to)
        else:
            span = f"{min(losses):.3f} to {max(losses):.3f}"
            print(f'"{text}": {len(row)} pictures, {order}, CapLoss {span}', file=to)
    to_name = "standard output" if pictures.outlet.is_standard_output else in_one_line(pictures.outlet.name)
    print(f"written: {to_name}", file=to)


def _print_json(pictures: _Pictures, facts: dict[str, Any]) -> None:
    entries = [
        {
            "text": drawing.text,
            "seed": drawing.seed,
            "candidate": drawing.candidate,
            "cap_loss": drawing.loss,
            "file": str(pictures.files.get((place, drawing.candidate), pictures.outlet.name)),
        }
        for place, row in enumerate(pictures.rows)
        for drawing in row
    ]
    print(json.dumps({"pictures": entries, **facts}, ensure_ascii=False, indent=2))
