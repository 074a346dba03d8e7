# SPDX-License-Identifier: Apache-2.0
"""The one thread that uses the models, and the queue before it."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any, cast

from cogview.serving.jobs import DrawJob, Job, Stopped
from cogview.serving.models import Models
from cogview.serving.queue import Queue
from cogview.serving.together import draw_together

log = logging.getLogger(__name__)


class Service:
    """Takes jobs and works them off in a thread of its own; a context manager."""

    def __init__(self, models: Models, queue: Queue | None = None) -> None:
        self.models, self.queue = models, queue or Queue()
        self._thread = threading.Thread(target=self._work, name="models", daemon=True)

    def __enter__(self) -> Service:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.queue.close()
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Have a job done. ValueError or OSError, one line, where it cannot be."""
        self.models.require_present()
        self.queue.put(job)

    def _work(self) -> None:
        while jobs := self.queue.take():
            try:
                self._do(jobs)
            except Exception as error:  # One request must not take the page from all others.
                problem = _problem(error)
                if not problem:
                    log.exception("a request failed")
                for job in jobs:
                    job.fail(problem or "the server made a mistake, which it has written to its log")

    def _do(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.begin()
        if isinstance(jobs[0], DrawJob):
            draw_together(self.models.run, cast(list[DrawJob], jobs))
            return
        (job,) = jobs
        with contextlib.suppress(Stopped):
            job.check()
            job.work(self.models)
            job.finish()


def _problem(error: Exception) -> str:
    """What a visitor is told; empty for what is a mistake of ours."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "there is not enough memory for it; ask for fewer pictures"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return str(error)
    return ""
