# SPDX-License-Identifier: Apache-2.0
"""Drawn pictures as files to take away, with what draws them again inside. Their names are ours alone."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from cogview.images import png_bytes, sheet_bytes
from cogview.run import Drawing
from cogview.serving.jobs import DrawJob


class File(NamedTuple):
    """What a browser saves."""

    name: str
    content: bytes


def picture_file(job: DrawJob, drawing: Drawing) -> File:
    """One picture."""
    about = {
        **_about(job),
        "candidate": drawing.candidate,
        "cap_loss": f"{drawing.loss:.4f}",
    }
    return File(f"cogview-{drawing.seed}-{drawing.candidate}.png", png_bytes(drawing.image, about))


def sheet_file(job: DrawJob) -> File:
    """All finished pictures of a job as one, best first."""
    content = sheet_bytes([[drawing.image for drawing in job.ranked]], _about(job))
    return File(f"cogview-{job.settings.seed}-sheet.png", content)


def enlarged_file(drawing: Drawing, enlarged: Image.Image) -> File:
    """A picture at twice the side."""
    about = {"prompt": drawing.text, "seed": drawing.seed, "candidate": drawing.candidate}
    return File(f"cogview-{drawing.seed}-{drawing.candidate}-large.png", png_bytes(enlarged, about))


def _about(job: DrawJob) -> dict[str, object]:
    settings = job.settings
    return {
        "prompt": job.text,
        "seed": settings.seed,
        "temperature": f"{settings.sampling.temperature:g}",
        "top_k": settings.sampling.top_k,
        "guidance": f"{settings.sampling.guidance:g}",
    }
