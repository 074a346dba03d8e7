# SPDX-License-Identifier: Apache-2.0
"""The tab that draws a part of a picture anew: what is painted over."""

from __future__ import annotations

from nicegui import ui
from nicegui.events import MouseEventArguments

from cogview.run import Drawing
from cogview.serving.asked import LONGEST_TEXT, read_text
from cogview.serving.gallery import Gallery
from cogview.serving.jobs import DrawJob, Job
from cogview.serving.panel import PIXELATED, Ticket, data_url
from cogview.serving.picture_box import PictureBox
from cogview.serving.service import Service
from cogview.serving.settings_row import SettingsRow
from cogview.serving.strokes import Painting
from cogview.serving.uploads import SHOWN_SIDE, Loaded, load_drawn

LEFT_BUTTON = 1


class PaintTab:
    """A picture, a brush, a text, and the candidates for what is painted over."""

    ticket: Ticket

    def __init__(self, service: Service) -> None:
        self.service = service
        self.loaded: Loaded | None = None
        self.painting = Painting()
        self.box = PictureBox(service.models.run.image_size, self.take, lambda line: self.ticket.tell(line))
        with ui.row(align_items="center") as self.tools:
            self.canvas = ui.interactive_image(
                on_mouse=self._paint,
                events=["pointerdown", "pointermove"],  # of a mouse, a pen or a finger
                sanitize=False,  # What is laid over the picture are numbers of ours.
            )
            # A finger paints; it does not scroll the page.
            self.canvas.style(f"width: {SHOWN_SIDE}px; cursor: crosshair; touch-action: none; {PIXELATED}")
            self.canvas.props("data-part=canvas")
            with ui.column():
                ui.label("Paint over what is to be drawn anew")
                ui.label("width of the brush")
                self.width = ui.slider(min=0.05, max=0.5, step=0.05, value=0.2).style("width: 12em")
                ui.button("Take back", icon="undo", on_click=self._undo).props("outline")
                ui.button("Clear", icon="clear", on_click=self._clear).props("outline")
        self.tools.visible = False
        self.text = ui.input("What the whole picture shows").props(f"maxlength={LONGEST_TEXT} outlined")
        self.text.classes("full-width").on("keydown.enter", self._draw)
        self.settings = SettingsRow(service.models.run, 4)
        with ui.row():
            ui.button("Draw it anew", icon="brush", on_click=self._draw)
            ui.button("Stop", icon="stop", on_click=lambda: self.ticket.stop()).props("outline")
        self.ticket = Ticket(service, self._show)
        self.gallery = Gallery({"Paint on this one": self.take_drawn})

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """What this tab waits for."""
        return (self.ticket,)

    def take_drawn(self, job: DrawJob, drawing: Drawing) -> None:
        """Go on with a picture that the page has drawn."""
        self.text.value = job.text
        self.take(load_drawn(drawing.image, self.service.models.run.image_size))

    def take(self, loaded: Loaded) -> None:
        """Paint on a picture."""
        self.ticket.tell("")
        self.loaded = loaded
        self.canvas.set_source(data_url(loaded.shown))
        self.tools.visible = True
        self._clear()

    def _paint(self, event: MouseEventArguments) -> None:
        if self.loaded is None:
            return
        side = self.loaded.shown.width
        x, y = event.image_x / side, event.image_y / side
        if event.type == "pointerdown":
            self.painting.begin(x, y, self.width.value)
        elif event.buttons & LEFT_BUTTON:
            self.painting.go_on(x, y)
        else:
            return
        self._show_strokes()

    def _undo(self) -> None:
        self.painting.undo()
        self._show_strokes()

    def _clear(self) -> None:
        self.painting.clear()
        self._show_strokes()

    def _show_strokes(self) -> None:
        if self.loaded is not None:
            self.canvas.set_content(self.painting.overlay(self.loaded.shown.width))

    def _draw(self) -> None:
        if self.ticket.submit(self._job):
            job = self.ticket.job
            assert isinstance(job, DrawJob)
            self.ticket.note.text = self.service.models.unknown(job.text)

    def _job(self) -> DrawJob:
        run = self.service.models.run
        if self.loaded is None:
            raise ValueError("there is no picture yet; drop one first, or pick a drawn one")
        mask = self.painting.mask(run.image_size)
        text = read_text(self.text.value)
        pieces, settings = run.pieces(text), self.settings.read()
        return DrawJob(text, pieces, settings, run.kept_codes(self.loaded.pixels, mask))

    def _show(self, job: Job) -> None:
        assert isinstance(job, DrawJob)
        self.gallery.show(job)
