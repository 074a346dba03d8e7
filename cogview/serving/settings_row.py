# SPDX-License-Identifier: Apache-2.0
"""The fields of how pictures are drawn."""

from __future__ import annotations

from nicegui import ui

from cogview.run import Run
from cogview.serving.asked import (
    LARGEST_GUIDANCE,
    LARGEST_SEED,
    MOST_PICTURES,
    Fields,
    Settings,
    read_settings,
)


class SettingsRow:
    """Seed, number, temperature, top-k and guidance of one tab."""

    def __init__(self, run: Run, num: int) -> None:
        self.run = run
        with ui.row(align_items="center"):
            self.num = ui.number("pictures", value=num, min=1, max=MOST_PICTURES, precision=0)
            self.seed = ui.number("seed", placeholder="random", min=0, max=LARGEST_SEED, precision=0)
            self.temperature = ui.number("temperature", value=run.sampling.temperature, min=0, step=0.1)
            self.top_k = ui.number("top-k", value=run.sampling.top_k, min=0, precision=0)
            self.guidance = ui.number(
                "guidance", value=run.sampling.guidance, min=0, max=LARGEST_GUIDANCE, step=0.5
            )
        for field in (self.num, self.seed, self.temperature, self.top_k, self.guidance):
            field.style("width: 7.5em")
        self.top_k.tooltip("draw among the k likeliest codes; 0 is all")
        self.temperature.tooltip("below 1 safer, above 1 wilder, 0 always the likeliest code")
        if run.text_dropout:
            self.guidance.tooltip("above 1 the text counts for more, in twice the time")
        else:
            self.guidance.tooltip("above 1 the text counts for more; this run was not trained for it")

    def read(self) -> Settings:
        """What is typed. ValueError, one line, for what is out of range."""
        fields = Fields(
            self.num.value,
            self.seed.value,
            self.temperature.value,
            self.top_k.value,
            self.guidance.value,
        )
        return read_settings(fields, self.run.sampling)
