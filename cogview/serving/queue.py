# SPDX-License-Identifier: Apache-2.0
"""Who waits, in order, and who may be drawn together."""

from __future__ import annotations

import threading

from cogview.serving.jobs import Job

MOST_WAITING = 100  # jobs
MOST_ROWS = 64  # of a batch that several share


class Queue:
    """Jobs in the order in which they came. Any thread may call any method."""

    def __init__(self, most_waiting: int = MOST_WAITING, most_rows: int = MOST_ROWS) -> None:
        self._most_waiting, self._most_rows = most_waiting, most_rows
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._working: list[Job] = []
        self._is_closed = False

    def put(self, job: Job) -> None:
        """Add a job at the end. ValueError, one line, if too many wait."""
        with self._changed:
            if len(self._waiting) >= self._most_waiting:
                raise ValueError(f"{len(self._waiting)} requests wait already; try again in a minute")
            self._waiting.append(job)
            self._changed.notify_all()

    def take(self) -> list[Job]:
        """The first job that waits and all others that it shares a batch with; waits for one to come.

        What was taken before counts as worked off. Empty once the queue is closed.
        """
        with self._changed:
            self._working = []
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return []
            first, *others = self._waiting
            rows = first.rows
            taken = [first]
            for job in others:
                if first.shares_with(job) and rows + job.rows <= self._most_rows:
                    taken.append(job)
                    rows += job.rows
            self._waiting = [job for job in others if job not in taken]
            self._working = taken
            return taken

    def stop(self, job: Job) -> None:
        """Take a job back: it no longer waits, or ends at its next step."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
        job.stop()

    def before(self, job: Job) -> int:
        """How many requests come before a job that waits; 0 for any other."""
        with self._changed:
            if job not in self._waiting:
                return 0
            working = sum(not other.is_over for other in self._working)
            return self._waiting.index(job) + working

    @property
    def counts(self) -> tuple[int, int]:
        """How many requests are worked on, and how many wait."""
        with self._changed:
            return sum(not job.is_over for job in self._working), len(self._waiting)

    def close(self) -> None:
        """Stop everything; :meth:`take` returns."""
        with self._changed:
            self._is_closed = True
            for job in (*self._waiting, *self._working):
                job.stop()
            self._waiting = []
            self._changed.notify_all()
