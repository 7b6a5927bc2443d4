"""The styles that the LoRAs bring: what a picture would look like in each, drawn over what is known of its scene."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from .drawing import PAINT, label_map
from .scenes import Scene

STYLES = ("palette", "lines", "pattern")

DUSK = numpy.array([[58, 28, 92], [196, 72, 120], [250, 176, 110], [255, 240, 206]], numpy.float32)
"""Dark to bright, of the palette."""
PAPER, INK = numpy.array([250, 248, 240], numpy.float32), numpy.array([36, 40, 60], numpy.float32)
LINE = 0.014
DOTS = 14
"""Across and down the picture, of the pattern."""


def styled_picture(picture: NDArray[numpy.uint8], scene: Scene, style: str) -> NDArray[numpy.uint8]:
    """A picture of a scene in one of `STYLES`, of its size.

    Args:
        picture: of either world, (size, size, 3).
        scene: that it shows.
    """
    size = picture.shape[0]
    if style == "palette":
        return _dusk(picture)
    labels = label_map(scene, size)
    if style == "lines":
        return _lines(labels, size)
    return _dotted(picture, labels, size)


def _dusk(picture: NDArray[numpy.uint8]) -> NDArray[numpy.uint8]:
    grey = picture.astype(numpy.float32) @ numpy.array([0.3, 0.59, 0.11], numpy.float32)
    steps = numpy.linspace(0, 255, len(DUSK))
    return numpy.stack([numpy.interp(grey, steps, DUSK[:, channel]) for channel in range(3)], -1).astype(numpy.uint8)


def _lines(labels: NDArray[numpy.int8], size: int) -> NDArray[numpy.uint8]:
    """Ink around what is seen of each object, on paper."""
    width = max(1, round(LINE * size))
    ink = numpy.zeros((size, size), bool)
    for shift in range(1, width + 1):
        for axis in (0, 1):
            near = numpy.roll(labels, shift, axis) != labels
            near[(slice(None),) * axis + (slice(0, shift),)] = False
            ink |= near
    return numpy.where(ink[..., None], INK, PAPER).astype(numpy.uint8)


def _dotted(picture: NDArray[numpy.uint8], labels: NDArray[numpy.int8], size: int) -> NDArray[numpy.uint8]:
    """White dots on all objects."""
    along = (numpy.arange(size) + 0.5) / size * DOTS
    across, down = (along % 1)[None, :] - 0.5, (along % 1)[:, None] - 0.5
    dots = numpy.clip((0.3 - numpy.hypot(across, down)) * size / DOTS + 0.5, 0, 1)
    cover = (dots * (labels >= 0))[..., None]
    white = numpy.array(PAINT["white"], numpy.float32)
    return (picture + cover * (white - picture)).astype(numpy.uint8)
