"""The outlines of shapes as polygons, and the signed distance to them as tables that are made once."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float32]
Loop = NDArray[numpy.float64]

REACH = 2.0
"""A table goes from -REACH to REACH in both directions, in radii of the shape."""
CELLS = 160


def outline(shape: str) -> Sequence[Loop]:
    """The loops around a shape of radius 1 at the origin, each (corners, 2); a second one is a hole."""
    return {
        "circle": lambda: [_round(0.95)],
        "square": lambda: [_regular(4, 1.15, math.pi / 4)],
        "triangle": lambda: [_regular(3, 1.22, -math.pi / 2) + numpy.array([0, 0.15])],
        "star": lambda: [_pointed(5, 1.2, 0.52)],
        "heart": lambda: [_heart()],
        "cross": lambda: [_cross(1.05, 0.38)],
        "ring": lambda: [_round(1.0), _round(0.5)],
        "diamond": lambda: [_regular(4, 1.0, math.pi / 2) * numpy.array([0.78, 1.25])],
        "flower": lambda: [_flower()],
    }[shape]()


def _round(radius: float) -> Loop:
    return _regular(48, radius, 0)


def _regular(corners: int, radius: float, first: float) -> Loop:
    angles = first + 2 * math.pi * numpy.arange(corners) / corners
    return radius * numpy.stack([numpy.cos(angles), numpy.sin(angles)], -1)


def _pointed(points: int, outer: float, inner: float) -> Loop:
    radii = numpy.tile([outer, inner], points)
    return _regular(2 * points, 1, -math.pi / 2) * radii[:, None]


def _heart() -> Loop:
    t = 2 * math.pi * numpy.arange(64) / 64
    x = 16 * numpy.sin(t) ** 3
    y = -(13 * numpy.cos(t) - 5 * numpy.cos(2 * t) - 2 * numpy.cos(3 * t) - numpy.cos(4 * t))
    return numpy.stack([x, y - 1], -1) / 15


def _cross(long: float, short: float) -> Loop:
    corners = [(short, long), (short, short), (long, short), (long, -short), (short, -short), (short, -long)]
    half = numpy.array(corners)
    return numpy.concatenate([half, -half])


def _flower() -> Loop:
    t = 2 * math.pi * numpy.arange(96) / 96
    return (0.82 + 0.3 * numpy.cos(6 * t))[:, None] * numpy.stack([numpy.cos(t), numpy.sin(t)], -1)


@functools.cache
def distance_table(shape: str) -> Array:
    """(CELLS + 1, CELLS + 1, 3): distance to the outline in radii, negative inside, and its gradient in x and y."""
    along = numpy.linspace(-REACH, REACH, CELLS + 1)
    x, y = numpy.meshgrid(along, along)
    points = numpy.stack([x, y], -1)
    distance = numpy.full(x.shape, numpy.inf)
    inside = numpy.zeros(x.shape, bool)
    for loop in outline(shape):
        for start, end in zip(loop, numpy.roll(loop, -1, 0), strict=True):
            distance = numpy.minimum(distance, _to_segment(points, start, end))
            inside ^= _crosses(points, start, end)
    signed = numpy.where(inside, -distance, distance)
    gradient_y, gradient_x = numpy.gradient(signed, 2 * REACH / CELLS)
    return numpy.stack([signed, gradient_x, gradient_y], -1).astype(numpy.float32)


def _to_segment(points: NDArray[numpy.float64], start: Loop, end: Loop) -> NDArray[numpy.float64]:
    along = end - start
    share = numpy.clip(((points - start) @ along) / (along @ along), 0, 1)
    return numpy.linalg.norm(points - start - share[..., None] * along, axis=-1)


def _crosses(points: NDArray[numpy.float64], start: Loop, end: Loop) -> NDArray[numpy.bool_]:
    """Whether a ray from each point to the right crosses the segment."""
    x, y = points[..., 0], points[..., 1]
    between = (start[1] > y) != (end[1] > y)
    rise = end[1] - start[1] or numpy.inf
    return between & (x < start[0] + (y - start[1]) * (end[0] - start[0]) / rise)
