# SPDX-License-Identifier: Apache-2.0
"""What a page says about a request, in one line."""

from __future__ import annotations

import math

from cogview.serving.jobs import DrawJob, Job, State


def status_line(job: Job, before: int) -> str:
    """How far ``job`` is, which ``before`` others precede."""
    if job.state is State.WAITING:
        return f"in the queue: {_requests(before)} before yours" if before else "in the queue: yours is next"
    if job.state is State.WORKING:
        return "at work" if not isinstance(job, DrawJob) else f"drawing {_pictures(job.settings.num)}"
    if job.state is State.STOPPED:
        kept = f"; {len(job.drawings)} were finished" if isinstance(job, DrawJob) and job.drawings else ""
        return f"stopped{kept}"
    if job.state is State.FAILED:
        return ""
    if isinstance(job, DrawJob):
        order = ", best first by CapLoss" if job.settings.num > 1 else ""
        return f"{_pictures(job.settings.num)}{order}; seed {job.settings.seed}, {job.seconds:.1f} s"
    return f"done in {job.seconds:.1f} s"


def queue_line(working: int, waiting: int) -> str:
    """How busy the server is."""
    if not working:
        return "nobody is waiting"
    return f"{_requests(working)} at work, {waiting} waiting"


def cap_loss_line(loss: float) -> str:
    """A CapLoss as it stands beside a picture."""
    return f"CapLoss {loss:.3f}" if math.isfinite(loss) else "no CapLoss"


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
