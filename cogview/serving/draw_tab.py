# SPDX-License-Identifier: Apache-2.0
"""The tab that draws pictures of a text."""

from __future__ import annotations

from collections.abc import Mapping

from nicegui import ui

from cogview.run import Drawing
from cogview.serving.asked import LONGEST_TEXT, read_text
from cogview.serving.downloads import enlarged_file
from cogview.serving.gallery import Action, Gallery
from cogview.serving.jobs import DrawJob, EnlargeJob, Job
from cogview.serving.panel import Shown, Ticket, download
from cogview.serving.service import Service
from cogview.serving.settings_row import SettingsRow


class DrawTab:
    """A text, how it is drawn, and its candidates.

    Args:
        actions: what else can be done with a drawn picture.
    """

    ticket: Ticket

    def __init__(self, service: Service, actions: Mapping[str, Action]) -> None:
        self.service = service
        self.text = ui.input("What to draw").props(f"maxlength={LONGEST_TEXT} outlined").classes("full-width")
        self.text.on("keydown.enter", self._draw)
        self.settings = SettingsRow(service.models.run, 8)
        with ui.row(align_items="center"):
            ui.button("Draw", icon="brush", on_click=self._draw)
            ui.button("Stop", icon="stop", on_click=lambda: self.ticket.stop()).props("outline")
            self.again = ui.button("Again with this seed", icon="replay", on_click=self._draw_again)
            self.again.props("outline").set_enabled(False)
        self.ticket = Ticket(service, self._show)
        if service.models.enlarger is not None:
            actions = {**actions, "Enlarge": self._enlarge}
        self.gallery = Gallery(actions)
        self.enlarged = Shown("the enlarged picture", 384)
        self.enlarge_ticket = Ticket(service, self._show_enlarged)
        self.save = ui.button("Download enlarged picture", icon="download", on_click=self._download_enlarged)
        self.save.props("outline").visible = False

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """What this tab waits for."""
        return (self.ticket, self.enlarge_ticket)

    def _draw(self) -> None:
        if self.ticket.submit(self._job):
            job = self.ticket.job
            assert isinstance(job, DrawJob)
            self.ticket.note.text = self.service.models.unknown(job.text)
            self.enlarge_ticket.stop()
            self.enlarged.set(None)
            self.save.visible = False

    def _draw_again(self) -> None:
        """The same noise; text and settings may have been changed."""
        job = self.gallery.job
        if job is not None:
            self.settings.seed.value = job.settings.seed
            self._draw()

    def _job(self) -> DrawJob:
        text = read_text(self.text.value)
        return DrawJob(text, self.service.models.run.pieces(text), self.settings.read())

    def _show(self, job: Job) -> None:
        assert isinstance(job, DrawJob)
        self.gallery.show(job)
        self.again.set_enabled(True)

    def _enlarge(self, _: DrawJob, drawing: Drawing) -> None:
        self.enlarge_ticket.submit(lambda: EnlargeJob(drawing))

    def _show_enlarged(self, job: Job) -> None:
        assert isinstance(job, EnlargeJob)
        self.enlarged.set(job.enlarged)
        self.save.visible = job.enlarged is not None

    def _download_enlarged(self) -> None:
        job = self.enlarge_ticket.job
        if isinstance(job, EnlargeJob) and job.enlarged is not None:
            download(enlarged_file(job.drawing, job.enlarged))
