"""The pictures and texts of a batch of scenes, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from .captions import caption_of, facts_of
from .drawing import BASE_SIZE, UPGRADED_SIZE, base_picture, upgraded_picture
from .scenes import SHAPES, Scene, scene_of
from .vocabulary import token_rows

HELD_OUT = 1_000_000_000
"""Seeds from here on are for measuring: no model has seen their scenes."""
FIRST_SCENES = {
    "latents": 1_000_000,
    "styles": 2_000_000,
    "word": 3_000_000,
    "adapter": 4_000_000,
    "fine-tuning": 5_000_000,
}
"""What a model learns from → the seed of its first scene, for the work's seed 0."""
SCENES_OF_A_SEED = 10_000_000
LARGEST_SEED = HELD_OUT // SCENES_OF_A_SEED - 1
"""Of the work, so that none of its scenes is held out."""


def first_scene(kind: str, seed: int = 0) -> int:
    """The seed of the first scene of a kind; the others follow."""
    return FIRST_SCENES[kind] + SCENES_OF_A_SEED * seed


def random_scene(numbers: numpy.random.Generator, shapes: tuple[str, ...] = SHAPES, scale: float = 1.0) -> Scene:
    """A scene that is not held out; arguments as those of `scene_of`."""
    return scene_of(int(numbers.integers(HELD_OUT)), shapes, scale)


Picture = NDArray[numpy.uint8]
Draw = Callable[[Scene], Picture]

WORLDS: dict[str, tuple[Draw, int]] = {
    "base": (base_picture, BASE_SIZE),
    "upgraded": (upgraded_picture, UPGRADED_SIZE),
}
"""How each world draws, and how large."""


def tensor_of(pictures: Sequence[Picture]) -> Tensor:
    """(rows, 3, height, width), -1 to 1."""
    stacked = torch.from_numpy(numpy.stack(pictures))
    return stacked.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def picture_of(row: Tensor) -> Picture:
    """The other way, of one row."""
    grey = ((row.clamp(-1, 1) + 1) * 127.5).round().byte()
    return grey.permute(1, 2, 0).cpu().numpy()


def caption(seed: int) -> str:
    return caption_of(facts_of(scene_of(seed)))


def tokens_of(captions: Sequence[str]) -> Tensor:
    """(rows, 77)."""
    return torch.tensor([token_rows(one) for one in captions])
