# SPDX-License-Identifier: Apache-2.0
"""The page: its tabs, and what ends when a visitor leaves."""

from __future__ import annotations

from nicegui import Client, ui

from cogview.run import Drawing
from cogview.serving.draw_tab import DrawTab
from cogview.serving.gallery import Action
from cogview.serving.jobs import DrawJob
from cogview.serving.paint_tab import PaintTab
from cogview.serving.panel import Ticket
from cogview.serving.read_tab import ReadTab
from cogview.serving.service import Service
from cogview.serving.status import queue_line

LOOK_EVERY = 0.1  # seconds


def build_page(client: Client, service: Service, has_votes: bool) -> None:
    """The page of one visitor. Its requests end when the visitor has left."""
    with ui.header().style("align-items: center"):
        ui.label("CogView").classes("text-h6")
        ui.label(service.models.name)
        ui.space()
        busy = ui.label().props("data-part=busy")
    with ui.tabs().classes("full-width") as tabs:
        draw, read, paint = ui.tab("Draw"), ui.tab("Read a picture"), ui.tab("Paint over")
        vote = ui.tab("Vote") if has_votes else None
    tickets: list[Ticket] = []
    with ui.tab_panels(tabs, value=draw, animated=False, keep_alive=True).classes("full-width"):
        with ui.tab_panel(read):
            read_tab = ReadTab(service)
        with ui.tab_panel(paint):
            paint_tab = PaintTab(service)
        with ui.tab_panel(draw):
            actions = {
                "Read it": _then(tabs, "Read a picture", read_tab.read_drawn),
                "Paint over it": _then(tabs, "Paint over", paint_tab.take_drawn),
            }
            draw_tab = DrawTab(service, actions)
        if vote is not None:
            with ui.tab_panel(vote):
                frame = ui.element("iframe").props('src="vote/" title="vote"')
                frame.style("border: 0; width: 100%; height: 75vh")
    for tab in (draw_tab, read_tab, paint_tab):
        tickets += tab.tickets

    def refresh() -> None:
        busy.text = queue_line(*service.queue.counts)
        for ticket in tickets:
            ticket.refresh()

    def leave() -> None:
        for ticket in tickets:
            if ticket.job is not None:
                service.queue.stop(ticket.job)

    ui.timer(LOOK_EVERY, refresh)
    client.on_delete(leave)


def _then(tabs: ui.tabs, name: str, act: Action) -> Action:
    """Do something and go to the tab where it is seen."""

    def act_and_go(job: DrawJob, drawing: Drawing) -> None:
        act(job, drawing)
        tabs.value = name

    return act_and_go
