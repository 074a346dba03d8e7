# SPDX-License-Identifier: Apache-2.0
"""What the tabs of the page have in common: one request at a time, its line, its problem, its end."""

from __future__ import annotations

import base64
from collections.abc import Callable

from nicegui import ui
from PIL import Image

from cogview.images import png_bytes
from cogview.serving.downloads import File
from cogview.serving.jobs import Job
from cogview.serving.service import Service
from cogview.serving.status import status_line

PIXELATED = "image-rendering: pixelated; display: block;"


class Ticket:
    """The request that a part of the page waits for, and the two lines that tell of it.

    Args:
        show: called with the job whenever it has changed.
    """

    def __init__(self, service: Service, show: Callable[[Job], object]) -> None:
        self.service, self.show = service, show
        self.job: Job | None = None
        self._count = 0  # of requests, by which whoever drives the page knows which one a line is about
        self._seen: tuple[object, ...] = ()
        self.status = ui.label().props("role=status")
        self.note = ui.label().classes("text-grey-8")
        self.problem = ui.label().props("role=alert").classes("text-negative")
        for line in (self.status, self.note, self.problem):
            line.bind_visibility_from(line, "text")

    def submit(self, make: Callable[[], Job]) -> bool:
        """Make a job and have it done; an earlier one ends. What is wrong with it is told on the page."""
        self.stop()
        self.tell("")
        try:
            job = make()
            self.service.submit(job)
        except (ValueError, OSError) as error:
            self.tell(str(error))
            return False
        self.job, self._seen = job, ()
        self._count += 1
        self.status.props["data-request"] = self._count
        self.refresh()
        return True

    def tell(self, problem: str) -> None:
        """Show a line about what is wrong."""
        self.problem.text = " ".join(problem.split())
        self.note.text = ""

    def stop(self) -> None:
        """The visitor no longer waits."""
        if self.job is not None:
            self.service.queue.stop(self.job)
            self.refresh()

    def refresh(self) -> None:
        """Show what has changed since the last time."""
        job = self.job
        if job is None:
            return
        before = self.service.queue.before(job)
        seen = (job.state, job.changes, before)
        if seen == self._seen:
            return
        self._seen = seen
        self.status.text = status_line(job, before)
        if job.problem:
            self.tell(job.problem)
        self.show(job)


def data_url(picture: Image.Image) -> str:
    """A picture as an address that holds it, so that no file and no route of the server does."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode()


class Shown:
    """A picture on the page."""

    def __init__(self, alt: str, side: int) -> None:
        style = f"width: {side}px; height: {side}px; {PIXELATED}"
        self.element = ui.element("img").style(style)
        self.element.props["alt"] = alt
        self.set(None)

    def set(self, picture: Image.Image | None) -> None:
        """Show another picture, or none."""
        self.element.visible = picture is not None
        self.element.props["src"] = "data:," if picture is None else data_url(picture)
        self.element.update()


def download(file: File) -> None:
    """Have the browser save a file."""
    ui.download.content(file.content, file.name, "image/png")
