# SPDX-License-Identifier: Apache-2.0
"""The place to drop a picture."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nicegui import run as threads
from nicegui import ui
from nicegui.events import UploadEventArguments

from cogview.serving.uploads import LARGEST_UPLOAD, Loaded, load_upload, too_large

_one_at_a_time = asyncio.Lock()  # A large picture takes a hundred megabytes while it is made small.


class PictureBox:
    """Takes a file by drop or by choice.

    Args:
        size: side of the pictures that the run reads.
        use: called with what is read.
        refuse: called with a line about what cannot be read.
    """

    def __init__(self, size: int, use: Callable[[Loaded], object], refuse: Callable[[str], object]) -> None:
        self.size, self.use, self.refuse = size, use, refuse
        self.upload = ui.upload(
            label="Drop a picture here, or choose one with +",
            auto_upload=True,
            max_file_size=LARGEST_UPLOAD,
            on_upload=self._take,
            on_rejected=lambda: refuse(too_large()),
        )
        self.upload.on("failed", lambda: refuse(too_large()), args=[])
        self.upload.props('accept="image/*" flat bordered').style("width: 20em")

    async def _take(self, event: UploadEventArguments) -> None:
        self.upload.reset()
        if event.file.size() > LARGEST_UPLOAD:
            self.refuse(too_large())
            return
        content = await event.file.read()
        try:
            async with _one_at_a_time:
                loaded = await threads.io_bound(load_upload, content, self.size)
        except ValueError as error:
            self.refuse(str(error))
            return
        if loaded is not None:  # The server is being stopped.
            self.use(loaded)
