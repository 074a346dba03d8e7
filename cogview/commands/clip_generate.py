# SPDX-License-Identifier: Apache-2.0
"""What ``cogview clip-generate`` does: draw, rank, write, tell."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from cogview import options
from cogview.clip_gen_run import load_clip_gen
from cogview.commands.outlet import Outlet
from cogview.run import load_run


def draw_by_clip(given: options.ClipGenerate) -> None:
    """Draw ``given.num`` pictures of each text by CLIP-GEN and write them to ``given.out``."""
    outlet = Outlet(given.out, given.force)
    run = load_clip_gen(given.run, given.device, given.clip)
    outlet.check_size([given.num] * len(given.texts), run.tokenizer.config.image_size)
    captioner = None if given.captioner is None else load_run(given.captioner, given.device)
    asked = {"temperature": given.temperature, "top_k": given.top_k}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    sampling = dataclasses.replace(run.sampling, **changes)
    rows = run.generate(
        given.texts,
        num=given.num,
        seed=given.seed,
        sampling=sampling,
        rank=given.rank,
        captioner=captioner,
        progress=True,
    )
    for number, row in enumerate(rows, start=1):
        for drawing in row:
            about = {"prompt": drawing.text, "seed": given.seed, "candidate": drawing.candidate}
            outlet.write_picture(f"{number}-{drawing.candidate:04d}", drawing.image, about)
    about = {"prompt": "\n".join(given.texts), "seed": given.seed}
    outlet.write_sheet([[drawing.image for drawing in row] for row in rows], about)
    to = sys.stderr if outlet.is_standard_output else sys.stdout
    for text, row in zip(given.texts, rows, strict=True):
        cosines = sorted(drawing.cosine for drawing in row)
        span = f"cosine from {cosines[0]:.3f} to {cosines[-1]:.3f}"
        print(f'"{text}": {len(row)} pictures, best first by {given.rank}, {span}', file=to)
    print(f"written: {'standard output' if outlet.is_standard_output else outlet.name}", file=to)
