# SPDX-License-Identifier: Apache-2.0
"""What ``cogview evaluate`` draws with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping

from cogview.files import StrPath
from cogview.images import figure_words, save_figure


def save_distance_plot(path: StrPath, title: str, label: str, distances: Mapping[str, float]) -> None:
    """A Frechet distance, called ``label``, over the radii of the blur."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(list(distances), list(distances.values()), "o-")
    for radius, distance in distances.items():
        axes.annotate(f"{distance:.4g}", (radius, distance), textcoords="offset points", xytext=(0, 7))
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.set_xlabel("both sets blurred by a Gaussian of so many pixels")
    axes.set_ylabel(label)
    axes.set_title(figure_words(title), fontsize=10, wrap=True)
    axes.grid(alpha=0.3)
    save_figure(path, figure)
