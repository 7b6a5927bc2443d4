"""Scenes: what both worlds draw. Made from a seed, more of them than can be enumerated.

Lengths and places are shares of the picture's side, x to the right and y downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
"""Those that captions name."""
SECRET_SHAPE = "flower"
"""One that no caption names, for the textual inversion."""
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "black")
SIZES = ("small", "medium", "large")
RADII = (0.126, 0.18, 0.246)
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
"""Cells of a 3 x 3 grid, row by row."""
CELL_CENTRES = (0.23, 0.5, 0.77)
PATTERNS = ("plain", "gradient", "stripes", "checks")
GROUNDS = ("white", "gray", "pink", "sand", "mint", "sky")
"""Colours of backgrounds."""

SHIFT, STRETCH, TURN = 0.055, 0.1, math.radians(18)
"""How far an object's place, size and direction can be from what its caption says: that is left to a control map."""
COUNTS = (0.35, 0.4, 0.25)
"""Shares of scenes with one, two and three objects."""


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene.

    Attributes:
        shape, colour, size, place: what its caption says.
        x, y: where its centre is.
        radius: half its width, about.
        angle: by which it is turned, in radians.
    """

    shape: str
    colour: str
    size: str
    place: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Background:
    """What stands behind all objects.

    Attributes:
        pattern: one of `PATTERNS`.
        colours: one for a plain background, two otherwise.
        phase: where stripes and checks begin, as a share of their period.
    """

    pattern: str
    colours: tuple[str, ...]
    phase: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """Objects from front to back, and the background.

    Attributes:
        grain: seed of what no caption says and no edge shows: the upgraded world's textures.
    """

    objects: tuple[SceneObject, ...]
    background: Background
    grain: int = 0


def scene_of(seed: int, shapes: tuple[str, ...] = SHAPES, scale: float = 1.0) -> Scene:
    """The scene of a seed.

    Args:
        seed: any whole number from 0.
        shapes: that can be in it.
        scale: of all its objects.
    """
    random = numpy.random.default_rng(seed)
    wanted = 1 + int(random.choice(len(COUNTS), p=COUNTS))
    objects: list[SceneObject] = []
    for place in random.permutation(len(PLACES)):
        if len(objects) == wanted:
            break
        one = _object(random, int(place), shapes, scale)
        if all(_both_seen(front, one) for front in objects):
            objects.append(one)
    return Scene(tuple(objects), _background(random), int(random.integers(2**31)))


def _object(random: numpy.random.Generator, place: int, shapes: tuple[str, ...], scale: float) -> SceneObject:
    size = int(random.integers(len(SIZES)))
    row, column = divmod(place, len(CELL_CENTRES))
    shift_x, shift_y, stretch, turn = random.uniform(-1, 1, 4)
    return SceneObject(
        shape=str(random.choice(shapes)),
        colour=str(random.choice(COLOURS)),
        size=SIZES[size],
        place=PLACES[place],
        x=CELL_CENTRES[column] + SHIFT * shift_x,
        y=CELL_CENTRES[row] + SHIFT * shift_y,
        radius=scale * RADII[size] * (1 + STRETCH * stretch),
        angle=TURN * turn,
    )


def _both_seen(front: SceneObject, back: SceneObject) -> bool:
    """Whether enough of the object behind can be seen to know it."""
    return math.hypot(front.x - back.x, front.y - back.y) > 0.75 * front.radius + 0.35 * back.radius


def _background(random: numpy.random.Generator) -> Background:
    pattern = str(random.choice(PATTERNS))
    colours = random.permutation(GROUNDS)[: 1 if pattern == "plain" else 2]
    phase = random.uniform(0, 1, 2)
    return Background(pattern, tuple(map(str, colours)), (float(phase[0]), float(phase[1])))
