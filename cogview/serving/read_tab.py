# SPDX-License-Identifier: Apache-2.0
"""The tab that reads a picture: its caption, its reconstruction, its CapLoss for a text of one's own."""

from __future__ import annotations

from nicegui import ui

from cogview.run import Drawing
from cogview.serving.asked import LONGEST_TEXT, read_text
from cogview.serving.jobs import DrawJob, Job, ReadJob, ScoreJob
from cogview.serving.panel import Shown, Ticket
from cogview.serving.picture_box import PictureBox
from cogview.serving.service import Service
from cogview.serving.status import cap_loss_line
from cogview.serving.uploads import Loaded, load_drawn

SIDE = 256


class ReadTab:
    """A picture, and what the run says of it."""

    ticket: Ticket

    def __init__(self, service: Service) -> None:
        self.service = service
        self.loaded: Loaded | None = None
        self.box = PictureBox(service.models.run.image_size, self.read, lambda line: self.ticket.tell(line))
        self.ticket = Ticket(service, self._show)
        with ui.row() as self.pictures:
            with ui.column():
                self.original = Shown("your picture", SIDE)
                ui.label("your picture")
            with ui.column():
                self.rebuilt = Shown("its reconstruction", SIDE)
                ui.label("as the image tokenizer rebuilds it from its codes")
        self.pictures.visible = False
        self.caption = ui.label().classes("text-h6").props("data-part=caption")
        with ui.row(align_items="center") as self.own:
            self.text = ui.input("A text of your own").props(f"maxlength={LONGEST_TEXT} outlined")
            self.text.style("width: 24em").on("keydown.enter", self._score)
            ui.button("How well does it fit?", on_click=self._score).props("outline")
            self.loss = ui.label().props("data-part=cap-loss")
        self.own.visible = False
        self.score_ticket = Ticket(service, self._show_score)

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """What this tab waits for."""
        return (self.ticket, self.score_ticket)

    def read_drawn(self, _: DrawJob, drawing: Drawing) -> None:
        """Read a picture that the page has drawn."""
        self.read(load_drawn(drawing.image, self.service.models.run.image_size))

    def read(self, loaded: Loaded) -> None:
        """Read a picture."""
        self.score_ticket.stop()
        self.loss.text = self.caption.text = ""
        if self.ticket.submit(lambda: ReadJob(loaded.pixels)):
            self.loaded = loaded
            self.original.set(loaded.shown)
            self.pictures.visible = self.own.visible = True

    def _show(self, job: Job) -> None:
        assert isinstance(job, ReadJob)
        self.rebuilt.set(job.rebuilt)
        if job.is_over and not job.problem:
            self.caption.text = f"“{job.caption}”, {cap_loss_line(job.loss)}"

    def _score(self) -> None:
        self.loss.text = ""
        if self.score_ticket.submit(self._score_job):
            job = self.score_ticket.job
            assert isinstance(job, ScoreJob)
            self.score_ticket.note.text = self.service.models.unknown(job.text)

    def _score_job(self) -> ScoreJob:
        if self.loaded is None:
            raise ValueError("there is no picture yet; drop one first")
        text = read_text(self.text.value)
        return ScoreJob(self.loaded.pixels, text, self.service.models.run.pieces(text))

    def _show_score(self, job: Job) -> None:
        assert isinstance(job, ScoreJob)
        self.loss.text = cap_loss_line(job.loss) if job.is_over and not job.problem else ""
