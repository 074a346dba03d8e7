# SPDX-License-Identifier: Apache-2.0
"""The page keeps nothing of a request that is over, and nothing of a visitor who has left."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter

import pytest
from torch import Tensor

from cogview.serving.models import load_models
from cogview.serving.service import Service

pytest.importorskip("nicegui", reason="needs the extra serve")

from nicegui import Client, ui
from nicegui.testing import user_simulation
from nicegui.testing.user_interaction import UserInteraction

from cogview.serving.page import build_page

PATIENCE = 60  # seconds, for a machine that has other things to do
COUNTED = ("cogview.", "nicegui.client", "nicegui.element", "PIL.")


def live_objects():
    """How many there are of each class of ours, of pages and their elements, of pictures and tensors."""
    gc.collect()
    kinds = Counter(map(type, gc.get_objects()))
    return {
        f"{kind.__module__}.{kind.__qualname__}": count
        for kind, count in kinds.items()
        if str(kind.__module__).startswith(COUNTED) or issubclass(kind, Tensor)
    }


class Visitor:
    """A page, as a browser holds it."""

    def __init__(self, user, client):
        self.user, self.client = user, client

    def find(self, kind, name):
        """The elements of a kind with a text or a label."""
        found = [each for each in self.client.elements.values() if isinstance(each, kind)]
        return [each for each in found if name in (getattr(each, "text", None), each.props.get("label"))]

    def type(self, name, value):
        for field in self.find((ui.input, ui.number), name):
            field.value = value

    async def press(self, name):
        """Press a button, and wait until what it asks for is done."""
        UserInteraction(self.user, {self.find(ui.button, name)[0]}, None).click()
        lines = [each for each in self.client.elements.values() if each.props.get("role") == "status"]
        end = time.monotonic() + PATIENCE
        while any(each.text.startswith(("in the queue", "drawing", "at work")) for each in lines):
            assert time.monotonic() < end, [each.text for each in lines]
            await asyncio.sleep(0.02)
        self.done = [each.text for each in lines if each.text]


async def visit(user, requests):
    """Come, have pictures drawn, read, compared with other words and painted over, and leave."""
    visitor = Visitor(user, await user.open("/"))
    visitor.type("pictures", 1)
    for number in range(requests):
        visitor.type("What to draw", f"a handwritten {number}")
        await visitor.press("Draw")
        await visitor.press("Read it")
        visitor.type("A text of your own", f"a handwritten {number + 1}")
        await visitor.press("How well does it fit?")
    assert sum("seed" in line for line in visitor.done) == 1
    assert sum(line.startswith("done in") for line in visitor.done) == 2
    visitor.client.delete()
    user.client = None


async def settled_objects():
    """What lives once two looks agree: what a page has sent may still be on its way."""
    end, now = time.monotonic() + PATIENCE, live_objects()
    while time.monotonic() < end:
        await asyncio.sleep(0.3)
        before, now = now, live_objects()
        if now == before:
            break
    return now


async def objects_after_visits(service, visits):
    """What lives after each of some visits of so many requests."""
    async with user_simulation() as user:

        @ui.page("/")
        def page(client: Client) -> None:
            build_page(client, service, False)

        counts = []
        for requests in visits:
            await visit(user, requests)
            counts.append(await settled_objects())
        return counts


def test_nothing_is_kept_of_requests_and_of_visitors(run_folder):
    with Service(load_models(run_folder, None, "cpu", "fp32")) as service:
        _, before, after = asyncio.run(objects_after_visits(service, (1, 1, 3)))
    grown = {
        name: (before.get(name, 0), count) for name, count in after.items() if count > before.get(name, 0)
    }
    assert not grown, f"objects after a visit of one request, and after one of three: {grown}"
    assert any(name.endswith("ScoreJob") for name in after), "the thread that draws knows its last job"
