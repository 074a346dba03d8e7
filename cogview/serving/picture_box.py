# SPDX-License-Identifier: Apache-2.0
"""The place to drop a picture, and the address that files are sent to.

NiceGUI's own element has a route for each of its instances. FastAPI keeps the handlers of 4,096 routes in a
cache, and with each of these handlers the whole page of a visitor who has left. Here one route serves all.
"""

from __future__ import annotations

import asyncio
import secrets
import weakref
from collections.abc import Callable

from fastapi import APIRouter, HTTPException, Request
from nicegui import run as threads
from nicegui import ui
from starlette.requests import ClientDisconnect

from cogview.serving.uploads import LARGEST_UPLOAD, Loaded, load_upload

REFUSED = f"the file is no picture, or is larger than {LARGEST_UPLOAD >> 20} MiB; save it smaller, as PNG"

_one_at_a_time = asyncio.Lock()  # A large picture takes a hundred megabytes while it is made small.
_boxes: weakref.WeakValueDictionary[str, PictureBox] = weakref.WeakValueDictionary()


class PictureBox:
    """Takes a file by drop or by choice.

    Args:
        size: side of the pictures that the run reads.
        use: called with what is read.
        refuse: called with a line about what cannot be read.
    """

    def __init__(self, size: int, use: Callable[[Loaded], object], refuse: Callable[[str], object]) -> None:
        self.size, self.use, self.refuse = size, use, refuse
        key = secrets.token_urlsafe(16)  # Nobody else can guess where to send a file to this visitor's page.
        _boxes[key] = self
        self.element = ui.element("q-uploader").style("width: 20em")
        self.element.props("auto-upload send-raw flat bordered accept=image/*")
        self.element.props["label"] = "Drop a picture here, or choose one with +"
        self.element.props["max-file-size"] = LARGEST_UPLOAD
        self.element.props["url"] = f"/upload/{key}"
        for event in ("rejected", "failed"):
            self.element.on(event, lambda: refuse(REFUSED), args=[])

    async def take(self, content: bytes) -> None:
        """Read a file that has arrived."""
        self.element.run_method("reset")
        try:
            async with _one_at_a_time:
                loaded = await threads.io_bound(load_upload, content, self.size)
        except ValueError as error:
            self.refuse(str(error))
            return
        if loaded is not None:  # It is None while the server is being stopped.
            self.use(loaded)


def upload_routes() -> APIRouter:
    """The address that browsers send files to."""
    routes = APIRouter()

    @routes.post("/upload/{key}")
    async def upload(key: str, request: Request) -> None:
        box = _boxes.get(key)
        if box is None:
            raise HTTPException(404)
        try:
            content = await request.body()
        except ClientDisconnect:  # It stopped, or the guard had enough of it.
            raise HTTPException(413) from None
        await box.take(content)

    return routes
