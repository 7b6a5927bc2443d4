"""The pictures and texts of a batch of scenes, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from .captions import caption_of, facts_of
from .drawing import BASE_SIZE, UPGRADED_SIZE, base_picture, upgraded_picture
from .scenes import Scene, scene_of
from .vocabulary import token_rows

HELD_OUT = 1_000_000_000
"""Seeds from here on are for measuring: no model has seen their scenes."""

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
