# SPDX-License-Identifier: Apache-2.0
"""What visitors wait for. The thread that draws changes a job, pages look at it.

Nothing in a job is changed in place: a page that looks while the other thread works sees the value before or
after, never half of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from enum import Enum

from PIL import Image
from torch import Tensor

from cogview.generation.engine import DrawOptions
from cogview.run import MAX_BATCH, Drawing
from cogview.serving.asked import Settings
from cogview.serving.models import Models


class State(Enum):
    """How far a job is."""

    WAITING = "waiting"
    WORKING = "working"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


class Stopped(Exception):
    """Raised within the work on a job that its visitor has stopped."""


class Job:
    """One request of one visitor."""

    rows = 1  # of a batch that it takes up

    def __init__(self) -> None:
        self.state = State.WAITING
        self.problem = ""  # one line, where it has failed
        self.changes = 0  # grows, so that a page knows whether to look again
        self.started = self.ended = math.nan

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in (State.DONE, State.STOPPED, State.FAILED)

    @property
    def seconds(self) -> float:
        """What the work itself took; NaN before its end."""
        return self.ended - self.started

    def shares_with(self, other: Job) -> bool:
        """Whether both can be worked on as one batch."""
        return False

    def work(self, models: Models) -> None:
        """Do what is asked, and call ``check`` at every step. A DrawJob shares its work: :mod:`.together`."""
        raise NotImplementedError

    def check(self, _: object = None) -> None:
        """Raises Stopped where the visitor no longer waits."""
        if self.is_over:
            raise Stopped

    def begin(self) -> None:
        """The work begins."""
        if not self.is_over:
            self.started = time.perf_counter()
            self._become(State.WORKING)

    def finish(self) -> None:
        """All is there."""
        self._end(State.DONE)

    def stop(self) -> None:
        """The visitor no longer waits."""
        self._end(State.STOPPED)

    def fail(self, problem: str) -> None:
        """``problem``: what the visitor is told."""
        self.problem = " ".join(problem.split())
        self._end(State.FAILED)

    def _end(self, state: State) -> None:
        if not self.is_over:
            self.ended = time.perf_counter()
            self._become(state)

    def _become(self, state: State) -> None:
        self.state = state
        self.changes += 1


class DrawJob(Job):
    """Pictures of a text, or the rest of a picture."""

    def __init__(
        self, text: str, pieces: Sequence[int], settings: Settings, given: Tensor | None = None
    ) -> None:
        super().__init__()
        self.text, self.pieces, self.settings = text, pieces, settings
        self.given = given  # int64 [num_codes]: codes that are kept, -1 where one is drawn
        self.partial: dict[int, Image.Image] = {}  # unfinished pictures by their number
        self.drawings: tuple[Drawing, ...] = ()
        self.rows = settings.num

    def shares_with(self, other: Job) -> bool:
        """A batch has one temperature, one top-k and one guidance; kept codes would hold up the others."""
        return (
            isinstance(other, DrawJob)
            and self.settings.sampling == other.settings.sampling
            and (self.given is None) == (other.given is None)
        )

    def show(self, number: int, partial: Image.Image) -> None:
        """An unfinished picture."""
        self.partial = {**self.partial, number: partial}
        self.changes += 1

    def add(self, drawing: Drawing) -> None:
        """A finished picture; the last one ends the job."""
        self.drawings = (*self.drawings, drawing)
        self.changes += 1
        if self.has_all:
            self.finish()

    @property
    def has_all(self) -> bool:
        """Whether every picture is finished."""
        return len(self.drawings) == self.settings.num

    @property
    def pictures(self) -> list[tuple[int, Image.Image]]:
        """What there is to look at, by number; once all are finished, in the order of CapLoss."""
        if self.has_all:
            return [(drawing.candidate, drawing.image) for drawing in self.ranked]
        finished = {drawing.candidate: drawing.image for drawing in self.drawings}
        return sorted({**self.partial, **finished}.items())

    @property
    def ranked(self) -> list[Drawing]:
        """The finished pictures, best first."""
        return sorted(self.drawings, key=lambda drawing: drawing.loss)


class ReadJob(Job):
    """The caption of a picture, and what the image tokenizer makes of it."""

    def __init__(self, pixels: Tensor) -> None:
        super().__init__()
        self.pixels = pixels  # [3, S, S]
        self.rebuilt: Image.Image | None = None
        self.caption, self.loss = "", math.nan

    def work(self, models: Models) -> None:
        run = models.run
        self.rebuilt = run.decode(run.encode(self.pixels))
        self.changes += 1
        (found,) = run.describe([self.pixels], on_step=self.check)
        self.caption, self.loss = found


class ScoreJob(Job):
    """CapLoss of a picture for a text of the visitor's own."""

    def __init__(self, pixels: Tensor, text: str, pieces: Sequence[int]) -> None:
        super().__init__()
        self.pixels, self.text, self.pieces = pixels, text, pieces
        self.loss = math.nan

    def work(self, models: Models) -> None:
        self.loss = models.cap_loss(self.pixels, self.pieces)


class EnlargeJob(Job):
    """A drawn picture at twice the side."""

    def __init__(self, drawing: Drawing) -> None:
        super().__init__()
        self.drawing = drawing
        self.enlarged: Image.Image | None = None

    def work(self, models: Models) -> None:
        enlarger = models.enlarger
        assert enlarger is not None
        options = DrawOptions(enlarger.sampling, max_batch=MAX_BATCH, on_step=self.check)
        (self.enlarged,) = enlarger.enlarge(
            [self.drawing.image], self.drawing.text, options, seed=self.drawing.seed
        )
