"""How the two worlds draw a scene, and what is known for certain of each picture.

The base world is flat and plain. The upgraded world shows the same scene under a lamp at the upper left: domed bodies,
cast shadows, grain and fine outlines, which the base world has never seen. That is the design: a picture can be of
the upgraded world's quality, or true to what the base made, and the two pull against each other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from .scenes import Background, Scene, SceneObject
from .shapes import CELLS, REACH, Array, distance_table

BASE_SIZE, UPGRADED_SIZE = 64, 128

PAINT = {
    "red": (214, 48, 49),
    "orange": (240, 138, 36),
    "yellow": (246, 206, 54),
    "green": (60, 158, 70),
    "teal": (32, 158, 160),
    "blue": (52, 98, 210),
    "purple": (134, 66, 176),
    "black": (44, 46, 54),
    "white": (246, 246, 242),
    "gray": (176, 180, 186),
    "pink": (246, 204, 214),
    "sand": (234, 214, 168),
    "mint": (190, 232, 204),
    "sky": (184, 216, 244),
}
PERIOD = 0.25
"""Of stripes and checks: as coarse as a VAE of factor 8 needs them."""

LAMP = numpy.array([-0.46, -0.58, 0.67], numpy.float32)
SHADOW_SHIFT, SHADOW_SOFTNESS, SHADOW = (0.024, 0.032), 0.03, 0.42
DOME = 0.55
"""How much of a radius the rounding of an edge takes."""
OUTLINE = 0.009
THREAD, LINEN = 8, 0.011
"""Of the cloth that everything lies on: a period in pixels of the upgraded world, and how deep it is."""


@dataclass(frozen=True)
class Window:
    """The part of a picture that an object can reach, and where each pixel is seen from the object.

    Attributes:
        rows, columns: of the picture.
        distance: (h, w) to the outline as a share of the picture's side, negative inside.
        slope: (h, w, 2), gradient of the distance in the picture.
        seen: (h, w, 2), places in radii, in the object's own directions.
    """

    rows: slice
    columns: slice
    distance: Array
    slope: Array
    seen: Array

    @property
    def of(self) -> tuple[slice, slice]:
        return self.rows, self.columns


def base_picture(scene: Scene, size: int = BASE_SIZE) -> NDArray[numpy.uint8]:
    """A scene in the base world, (size, size, 3)."""
    canvas = ground(scene.background, size)
    for one in reversed(scene.objects):
        if window := window_of(one, size):
            cover = coverage(window.distance, size)[..., None]
            canvas[window.of] += cover * (paint(one.colour) - canvas[window.of])
    return _bytes(canvas)


def upgraded_picture(scene: Scene, size: int = UPGRADED_SIZE) -> NDArray[numpy.uint8]:
    """A scene in the upgraded world, (size, size, 3)."""
    random = numpy.random.default_rng(scene.grain)
    canvas = ground(scene.background, size) * _daylight(size) + _linen(size)
    for one in reversed(scene.objects):
        _cast_shadow(canvas, one, size)
        if window := window_of(one, size):
            body = _body(one, window, random)
            cover = coverage(window.distance, size)[..., None]
            canvas[window.of] += cover * (body - canvas[window.of])
    return _bytes(canvas)


def label_map(scene: Scene, size: int) -> NDArray[numpy.int8]:
    """Which object is seen at each pixel, counted from the front; -1 for the background. (size, size)"""
    labels = numpy.full((size, size), -1, numpy.int8)
    for number, one in reversed(list(enumerate(scene.objects))):
        if window := window_of(one, size):
            labels[window.of][window.distance < 0] = number
    return labels


def edge_map(scene: Scene, size: int) -> NDArray[numpy.uint8]:
    """White lines, one pixel wide, around what is seen of each object. (size, size)"""
    labels = label_map(scene, size)
    edges = numpy.zeros((size, size), bool)
    edges[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edges[:-1] |= labels[:-1] != labels[1:]
    return edges.astype(numpy.uint8) * 255


def depth_map(scene: Scene, size: int) -> NDArray[numpy.uint8]:
    """Near bright, far dark: objects are upright boards one behind another, the background is black. (size, size)"""
    levels = numpy.array([255, 190, 125, 0], numpy.uint8)
    return levels[label_map(scene, size)]


def window_of(one: SceneObject, size: int, shift: tuple[float, float] = (0.0, 0.0)) -> Window | None:
    """The part of a picture of this size that an object reaches, moved by `shift`; None outside of it."""
    x, y = one.x + shift[0], one.y + shift[1]
    reach = 1.7 * one.radius
    rows, columns = _span(y, reach, size), _span(x, reach, size)
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return None
    across = ((numpy.arange(columns.start, columns.stop, dtype=numpy.float32) + 0.5) / size - x) / one.radius
    down = ((numpy.arange(rows.start, rows.stop, dtype=numpy.float32) + 0.5) / size - y) / one.radius
    cosine, sine = numpy.float32(numpy.cos(one.angle)), numpy.float32(numpy.sin(one.angle))
    own_x = cosine * across[None, :] + sine * down[:, None]
    own_y = cosine * down[:, None] - sine * across[None, :]
    found = _look_up(distance_table(one.shape), own_x, own_y)
    slope_x, slope_y = found[..., 1], found[..., 2]
    slope = numpy.stack([cosine * slope_x - sine * slope_y, sine * slope_x + cosine * slope_y], -1)
    return Window(rows, columns, found[..., 0] * one.radius, slope, numpy.stack([own_x, own_y], -1))


def _span(centre: float, reach: float, size: int) -> slice:
    return slice(max(0, int((centre - reach) * size)), min(size, int((centre + reach) * size) + 1))


def _look_up(table: Array, x: Array, y: Array) -> Array:
    """Bilinear."""
    scale = CELLS / (2 * REACH)
    column = numpy.clip((x + REACH) * scale, 0, CELLS - 1e-3)
    row = numpy.clip((y + REACH) * scale, 0, CELLS - 1e-3)
    left, top = column.astype(numpy.intp), row.astype(numpy.intp)
    right_share, bottom_share = (column - left)[..., None], (row - top)[..., None]
    upper = table[top, left] * (1 - right_share) + table[top, left + 1] * right_share
    lower = table[top + 1, left] * (1 - right_share) + table[top + 1, left + 1] * right_share
    return upper * (1 - bottom_share) + lower * bottom_share


def coverage(distance: Array, size: int) -> Array:
    """How much of each pixel lies inside."""
    return numpy.clip(0.5 - distance * size, 0, 1)


def paint(colour: str) -> Array:
    return numpy.array(PAINT[colour], numpy.float32) / 255


def ground(background: Background, size: int) -> Array:
    """The background alone, (size, size, 3), 0 to 1."""
    first, second = paint(background.colours[0]), paint(background.colours[-1])
    along = (numpy.arange(size, dtype=numpy.float32) + 0.5) / size
    share = _share_of_second(background, along, size)
    return first + share[..., None] * (second - first)


def _share_of_second(background: Background, along: Array, size: int) -> Array:
    if background.pattern == "plain":
        return numpy.zeros((size, size), numpy.float32)
    if background.pattern == "gradient":
        return numpy.broadcast_to(along[:, None], (size, size)).astype(numpy.float32)
    across, down = (_wave(along + phase * PERIOD, size) for phase in background.phase)
    if background.pattern == "stripes":
        return numpy.broadcast_to(across, (size, size)).astype(numpy.float32)
    return across[None, :] * (1 - down[:, None]) + down[:, None] * (1 - across[None, :])


def _wave(along: Array, size: int) -> Array:
    """0 and 1 in turns, with edges a pixel wide."""
    place = numpy.abs((along / PERIOD) % 1 - 0.5) - 0.25
    return numpy.clip(0.5 + place * PERIOD * size, 0, 1)


def _cast_shadow(canvas: Array, one: SceneObject, size: int) -> None:
    if window := window_of(one, size, SHADOW_SHIFT):
        depth = numpy.clip(0.5 - window.distance / SHADOW_SOFTNESS, 0, 1)
        canvas[window.of] *= 1 - SHADOW * (depth * depth * (3 - 2 * depth))[..., None]


def _body(one: SceneObject, window: Window, random: numpy.random.Generator) -> Array:
    """Colour under the lamp, (h, w, 3)."""
    depth = numpy.clip(-window.distance / (DOME * one.radius), 0, 1)
    steepness = 0.95 * (1 - depth) ** 1.5
    normal = numpy.concatenate([window.slope * steepness[..., None], numpy.ones_like(depth)[..., None]], -1)
    normal /= numpy.linalg.norm(normal, axis=-1, keepdims=True)
    light = normal @ LAMP
    shine = numpy.clip(2 * light * normal[..., 2] - LAMP[2], 0, 1) ** 14
    weave = _weave(one, window.seen, random)
    colour = paint(one.colour) * (0.42 + 0.72 * numpy.clip(light, 0, 1) + 0.09 * weave)[..., None]
    colour += 0.4 * shine[..., None]
    rim = numpy.clip(1.2 - numpy.abs(window.distance + 0.5 * OUTLINE) / OUTLINE, 0, 1)[..., None]
    return colour + 0.8 * rim * (0.3 * paint(one.colour) - colour)


def _weave(one: SceneObject, seen: Array, random: numpy.random.Generator) -> Array:
    """A body's texture, -1 to 1: grooves for round shapes, ribs for others, both of a width that the seed decides."""
    phase, width = random.uniform(0, 2 * numpy.pi), random.uniform(0.34, 0.42)
    x, y = seen[..., 0] * one.radius, seen[..., 1] * one.radius
    if one.shape in ("circle", "ring", "heart", "flower"):
        return numpy.sin(numpy.hypot(x + 0.05, y + 0.05) * (2 * numpy.pi / (0.15 * width)) + phase)
    return numpy.sin((x + y) * (2 * numpy.pi / (0.2 * width)) + phase)


@functools.cache
def _daylight(size: int) -> Array:
    """Brighter at the upper left, (size, size, 1)."""
    along = (numpy.arange(size, dtype=numpy.float32) + 0.5) / size
    return (1.04 - 0.2 * ((along[None, :] ** 2 + along[:, None] ** 2) / 2))[..., None]


@functools.cache
def _linen(size: int) -> Array:
    """Fine threads both ways, (size, size, 1)."""
    along = (numpy.arange(size, dtype=numpy.float32) + 0.5) * (UPGRADED_SIZE / size)
    thread = numpy.sin(along * (2 * numpy.pi / THREAD))
    return (LINEN * (thread[:, None] + thread[None, :]))[..., None]


def _bytes(canvas: Array) -> NDArray[numpy.uint8]:
    return (numpy.clip(canvas, 0, 1) * 255 + 0.5).astype(numpy.uint8)
