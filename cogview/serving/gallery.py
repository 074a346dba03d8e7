# SPDX-License-Identifier: Apache-2.0
"""The candidates of a request: as they are drawn, then in the order of CapLoss; one of them may be picked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nicegui import ui

from cogview.run import Drawing
from cogview.serving.downloads import picture_file, sheet_file
from cogview.serving.jobs import DrawJob
from cogview.serving.panel import Shown, download
from cogview.serving.status import cap_loss_line

SIDE = 128  # pixels of a candidate on the page
Action = Callable[[DrawJob, Drawing], object]  # with a picture and the request that it comes from
PICKED = "outline: 3px solid #1976d2;"


@dataclass
class _Cell:
    button: ui.button
    picture: Shown
    label: ui.label


class Gallery:
    """Cells for the pictures of one job at a time.

    Args:
        actions: what can be done with a picture that is picked, by the names of their buttons.
    """

    def __init__(self, actions: Mapping[str, Action]) -> None:
        self.job: DrawJob | None = None
        self.picked = 0
        self._cells: list[_Cell] = []
        self._grid = ui.row()
        with ui.row(align_items="center") as self._actions:
            ui.button("Download sheet", icon="grid_view", on_click=self._download_sheet).props("outline")
            ui.button("Download picture", icon="download", on_click=self._download).props("outline")
            for name, act in actions.items():
                ui.button(name, on_click=lambda act=act: self._act(act)).props("outline")
        self._actions.visible = False

    def show(self, job: DrawJob) -> None:
        """What there is of a job's pictures."""
        if job is not self.job:
            self.job, self.picked = job, 0
            self._make_cells(job.settings.num)
        losses = {drawing.candidate: drawing.loss for drawing in job.drawings}
        for cell, (number, picture) in zip(self._cells, job.pictures, strict=False):
            cell.picture.set(picture)
            cell.label.text = cap_loss_line(losses[number]) if number in losses else "…"
        self._actions.visible = self._is_ranked
        self._mark()

    @property
    def _is_ranked(self) -> bool:
        return self.job is not None and self.job.has_all

    def _make_cells(self, count: int) -> None:
        self._grid.clear()
        self._cells = []
        with self._grid:
            for place in range(count):
                pick = ui.button(on_click=lambda place=place: self._pick(place))
                pick.props("flat no-caps padding=4px color=grey-9").props["aria-label"] = f"pick {place + 1}"
                with pick, ui.column(align_items="center").style("gap: 2px"):
                    picture = Shown(f"picture {place + 1}", SIDE)
                    self._cells.append(_Cell(pick, picture, ui.label("…").classes("text-caption")))

    def _pick(self, place: int) -> None:
        self.picked = place
        self._mark()

    def _mark(self) -> None:
        for place, cell in enumerate(self._cells):
            is_marked = place == self.picked and self._is_ranked
            cell.picture.element.style(PICKED if is_marked else "outline: none;")

    def _act(self, act: Action) -> None:
        if self.job is not None and self._is_ranked:
            act(self.job, self.job.ranked[self.picked])

    def _download(self) -> None:
        self._act(lambda job, drawing: download(picture_file(job, drawing)))

    def _download_sheet(self) -> None:
        self._act(lambda job, _: download(sheet_file(job)))
