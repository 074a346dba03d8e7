# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of several requests as one batch. Who leaves it costs nothing from the next step on.

When a visitor leaves, the batch is given up at that step. Those who stay go on from the codes that they have:
these are read at once, as a prompt is, and not drawn again. A picture depends on its text, seed and number
alone, so it is the same (to rounding) whoever shared its batch, and whoever left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor

from cogview.generation.engine import DrawOptions
from cogview.generation.text_to_image import Candidates, Request
from cogview.run import MAX_BATCH, Run
from cogview.serving.jobs import DrawJob, Stopped


@dataclass(frozen=True)
class _Row:
    """One picture of a job."""

    job: DrawJob
    number: int
    known: Tensor | None  # its codes so far, -1 where none is drawn

    @property
    def request(self) -> tuple[str, Request]:
        job = self.job
        return job.text, Request(job.pieces, job.settings.seed, self.known, self.number)


def draw_together(run: Run, jobs: Sequence[DrawJob]) -> None:
    """Draw and rank all pictures of ``jobs``, which share one kind of settings.

    A job is told of its unfinished pictures, and of each finished one as soon as it is ranked. Jobs that are
    over, even while their pictures are drawn, are left out from the next step on.
    """
    rows = [_Row(job, number, job.given) for job in jobs for number in range(job.settings.num)]
    while rows := [row for row in rows if not row.job.is_over]:
        rows = _draw(run, rows)


def _draw(run: Run, rows: Sequence[_Row]) -> list[_Row]:
    """Draw until all is drawn or somebody leaves; what is still to be drawn, with its codes so far."""
    left = dict(enumerate(rows))
    settings = rows[0].job.settings
    options = DrawOptions(settings.sampling, max_batch=MAX_BATCH)

    def look(batch: Candidates) -> None:
        if any(rows[place].job.is_over for place in batch.requests):
            for place, codes in zip(batch.requests, batch.codes.cpu(), strict=True):
                left[place] = replace(rows[place], known=codes.long())
            raise Stopped

    def show(partial: Iterable[tuple[int, Image.Image]]) -> None:
        for place, image in partial:
            rows[place].job.show(rows[place].number, image)

    try:
        for batch in run.draw([row.request for row in rows], 1, options, on_partial=show, on_codes=look):
            for place, drawing in batch:
                del left[place]
                rows[place].job.add(drawing)
    except Stopped:
        pass
    return list(left.values())
