"""Names beside the points of a chart, none over another."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

Box = tuple[float, float, float, float]


def name_points(axis: Any, points: Iterable[tuple[float, float, str]], size: float) -> None:
    """Write the name of every point (x, y, name) beside it, in letters of `size`, where it covers no name before it.

    To be called when everything has been drawn: where a name fits depends on the axis's limits.
    """
    axis.figure.canvas.draw()
    scale = axis.figure.dpi / 72
    placed: list[Box] = []
    listed = list(points)
    dots = [tuple(axis.transData.transform((x, y)) / scale) for x, y, _ in listed]
    for (x, y, name), (left, bottom) in zip(listed, dots, strict=True):
        width, height = 0.62 * size * len(name), 1.1 * size

        def box(offset: tuple[float, float], at: Box = (left, bottom, width, height)) -> Box:
            return at[0] + offset[0], at[1] + offset[1], at[2], at[3]

        steps = [0.5 * size + 1.15 * size * row for row in range(8)]
        rows = sorted([*steps, *(-step - height for step in steps)], key=abs)
        offsets = list(product((5.0, -5.0 - width), rows))
        offsets.sort(key=lambda one: abs(one[1]))
        best = next((one for one in offsets if not any(_overlap(box(one), other) for other in placed)), offsets[0])
        placed.append(box(best))
        far = abs(best[1]) > 2.5 * size
        arrow = {"arrowstyle": "-", "linewidth": 0.4, "color": "#8492a1"} if far else None
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": size, "annotation_clip": False}
        axis.annotate(name, (x, y), xytext=best, arrowprops=arrow, **style)


def _overlap(one: Box, other: Box) -> bool:
    apart = one[0] + one[2] <= other[0] or other[0] + other[2] <= one[0]
    return not apart and not (one[1] + one[3] <= other[1] or other[1] + other[3] <= one[1])
