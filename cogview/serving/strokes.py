# SPDX-License-Identifier: Apache-2.0
"""What a visitor paints over a picture: the strokes of a brush, as a mask and as an overlay to look at."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

MOST_POINTS = 20_000  # of one painting; a hand does not get there
COLOUR = "#ff2d87"

Point = tuple[float, float]


class Painting:
    """Strokes on a square, in shares of its side, so that they fit the picture at any size."""

    def __init__(self) -> None:
        self.strokes: list[tuple[float, list[Point]]] = []  # width of the brush, and where it went
        self._points = 0

    def begin(self, x: float, y: float, width: float) -> None:
        """Put the brush down."""
        if self._has_room_for(x, y) and math.isfinite(width):
            self.strokes.append((min(max(width, 0.01), 1.0), []))
            self.go_on(x, y)

    def go_on(self, x: float, y: float) -> None:
        """Draw the brush on to a point. Points that are no place, or too many of them, are left out."""
        if not self.strokes or not self._has_room_for(x, y):
            return
        self._points += 1
        self.strokes[-1][1].append((min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)))

    def _has_room_for(self, x: float, y: float) -> bool:
        return math.isfinite(x) and math.isfinite(y) and self._points < MOST_POINTS

    def undo(self) -> None:
        """Take the last stroke back."""
        if self.strokes:
            self._points -= len(self.strokes.pop()[1])

    def clear(self) -> None:
        """Take all strokes back."""
        self.strokes, self._points = [], 0

    def mask(self, side: int) -> Image.Image:
        """White where the brush was, black elsewhere. ValueError if nothing is painted."""
        if not self._points:
            raise ValueError("nothing is painted yet; paint over the part that is to be drawn anew")
        mask = Image.new("L", (side, side))
        pen = ImageDraw.Draw(mask)
        for width, points in self.strokes:
            places = [(x * (side - 1), y * (side - 1)) for x, y in points]
            radius = width * side / 2
            # A brush that is thinner than a pixel leaves its trace too.
            pen.line([*places, places[-1]], fill=255, width=max(1, round(2 * radius)))
            for x, y in places:
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return mask

    def overlay(self, side: int) -> str:
        """The strokes as SVG of ``side`` units; only numbers of ours are in it."""
        parts = []
        for width, points in self.strokes:
            places = " ".join(f"{x * side:.1f},{y * side:.1f}" for x, y in points)
            if len(points) == 1:  # A line of one point would not be seen.
                places += f" {points[0][0] * side + 0.1:.1f},{points[0][1] * side:.1f}"
            parts.append(
                f'<polyline points="{places}" fill="none" stroke="{COLOUR}" stroke-opacity="0.6" '
                f'stroke-width="{width * side:.1f}" stroke-linecap="round" stroke-linejoin="round"/>'
            )
        return "".join(parts)
