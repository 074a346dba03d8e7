# SPDX-License-Identifier: Apache-2.0
"""What the studies draw with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cogview.files import StrPath
from cogview.images import save_figure

FLOAT16_LIMIT = 65504


def save_stability_plot(path: StrPath, records: Sequence[dict[str, Any]]) -> None:
    """Losses, trunk and scores over the steps, and the trunk by layer; one colour per variant.

    A line per seed. A cross marks the last step before an overflow.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=100, layout="constrained")
    axes = figure.subplots(2, 2)
    names = list(dict.fromkeys(record["variant"] for record in records))
    panels = [
        (axes[0, 0], "largest value in the trunk", lambda record: record["largest"]["trunk"]),
        (axes[0, 1], "largest attention score in memory", lambda record: record["largest"]["scores"]),
        (axes[1, 0], "loss (nats per token)", lambda record: record["loss"]),
    ]
    for axis, title, values_of in panels:
        for record in records:
            values, colour = values_of(record), f"C{names.index(record['variant'])}"
            axis.plot(values, color=colour, linewidth=1, alpha=0.8)
            if record["overflow"] is not None and values:
                axis.plot(len(values) - 1, values[-1], "x", color=colour, markersize=9, markeredgewidth=2)
        axis.set_title(title)
        axis.set_xlabel("step")
    for record in records:
        values = record["largest_by_layer"].get("trunk", [])
        axes[1, 1].plot(values, color=f"C{names.index(record['variant'])}", linewidth=1, alpha=0.8)
    axes[1, 1].set_title("largest value in the trunk by layer, last step without overflow")
    axes[1, 1].set_xlabel("layer")
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in (axes[0, 0], axes[0, 1], axes[1, 1]):
        axis.axhline(FLOAT16_LIMIT, color="black", linestyle="--", linewidth=1)
    handles = [axes[1, 0].plot([], [], color=f"C{index}", label=name)[0] for index, name in enumerate(names)]
    limit = axes[1, 0].plot([], [], "k--", linewidth=1, label="float16's largest value, 65,504")
    figure.legend(handles=handles + limit, loc="outside lower center", ncols=3)
    save_figure(path, figure)


def save_tokenizer_plot(path: StrPath, records: Sequence[dict[str, Any]]) -> None:
    """L2 loss and codes used over the steps; one colour per method, a line per seed, in running means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(dict.fromkeys(record["method"] for record in records))
    panels = (("loss", "L2 loss (mean squared pixel error)"), ("codes_used", "codes used in a batch"))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for record in records:
            place = names.index(record["method"])
            label = record["method"] if record["seed"] == 0 and key == "loss" else None
            axis.plot(_smooth(record[key]), color=f"C{place}", linewidth=1.2, alpha=0.8, label=label)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_yscale("log")
    figure.legend(loc="outside lower center", ncols=len(names))
    save_figure(path, figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """Running means of the last steps."""
    return [
        sum(part) / len(part) for end in range(len(values)) if (part := values[max(0, end - 19) : end + 1])
    ]
