"""The small grammar that tells all of a scene, and its parser.

    small red circle top left in front of large blue square center on white and sky stripes

Objects stand from front to back. What a scene leaves to chance (`scenes.SHIFT` and its like) is not in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import WrongArgument
from .scenes import COLOURS, GROUNDS, PATTERNS, PLACES, SHAPES, SIZES, Scene

BETWEEN = " in front of "
JOINT = {"gradient": "to", "stripes": "and", "checks": "and"}
"""What stands between the two colours of a pattern."""
WORDS = tuple(
    dict.fromkeys(
        " ".join([*SIZES, *COLOURS, *SHAPES, *PLACES, *GROUNDS, *PATTERNS[1:], "in front of on to and"]).split()
    )
)
"""All words of the grammar."""

_OBJECT = re.compile(
    rf"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(sorted(PLACES, key=len)[::-1])})"
)
_BACKGROUND = re.compile(
    rf"({'|'.join(GROUNDS)})(?: (?:to|and) ({'|'.join(GROUNDS)}) ({'|'.join(PATTERNS[1:])}))?",
)


@dataclass(frozen=True)
class ObjectFacts:
    """What a caption says of an object."""

    size: str
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Facts:
    """What a caption says: objects from front to back, and the background."""

    objects: tuple[ObjectFacts, ...]
    pattern: str
    grounds: tuple[str, ...]


def facts_of(scene: Scene) -> Facts:
    """What a scene's caption says."""
    objects = tuple(ObjectFacts(one.size, one.colour, one.shape, one.place) for one in scene.objects)
    return Facts(objects, scene.background.pattern, scene.background.colours)


def caption_of(facts: Facts, names: Mapping[str, str] | None = None) -> str:
    """The caption that says these facts.

    Args:
        names: other words for shapes, such as the one of a textual inversion.
    """
    names = names or {}
    objects = (f"{one.size} {one.colour} {names.get(one.shape, one.shape)} {one.place}" for one in facts.objects)
    first = facts.grounds[0]
    ground = first if facts.pattern == "plain" else f"{first} {JOINT[facts.pattern]} {facts.grounds[1]} {facts.pattern}"
    return f"{BETWEEN.join(objects)} on {ground}"


def parse(caption: str) -> Facts:
    """The facts of a caption.

    Raises:
        WrongArgument: it is not of the grammar.
    """
    objects, found, ground = caption.rpartition(" on ")
    matches = [_OBJECT.fullmatch(one) for one in objects.split(BETWEEN)]
    background = _BACKGROUND.fullmatch(ground)
    if not found or background is None or not all(matches):
        raise WrongArgument(f"The caption '{caption}' is not of the miniature world's grammar.")
    facts = tuple(ObjectFacts(one[1], one[2], one[3], one[4]) for one in matches if one is not None)
    first, second, pattern = background.groups()
    return Facts(facts, pattern or "plain", (first, second) if pattern else (first,))
