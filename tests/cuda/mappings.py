"""Mapping layers for tests of their CUDA path, and its kernel as torch computes it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from lib_xadapter.mapping import MappingLayers, read_layout
from tests.seeded import seeded
from tests.small_adapter import AdapterPlan

SHAPES = [(1, 4, 4), (2, 3, 5), (3, 7, 2), (8, 2, 3), (1, 1, 6), (2, 1, 1)]
"""Rows, height and width of level 0: square, wide, high, a large batch, a line, a pixel."""

SCALES = (1, 2, 2)
"""The base's features of each level beside those of level 0."""


def released(dtype: torch.dtype = torch.float32, plan: AdapterPlan | None = None) -> MappingLayers:
    """Small mapping layers in the released structure, in a type."""
    plan = plan or AdapterPlan()
    layers = MappingLayers(read_layout(plan.shapes()))
    layers.load_state_dict(weights(plan))
    return layers.to(dtype).eval().requires_grad_(False)


@functools.lru_cache(maxsize=4)
def weights(plan: AdapterPlan) -> dict[str, Tensor]:
    """A plan's weights, made once; to be copied, not kept."""
    return plan.weights()


def base_feature(level: int, shape: tuple[int, int, int], plan: AdapterPlan | None = None) -> Tensor:
    """The base's feature of a level, in float32."""
    rows, height, width = shape
    scale = SCALES[level]
    channels = (plan or AdapterPlan()).in_channels[level]
    return seeded(f"base.{level}", (rows, channels, height * scale, width * scale))


def upgraded_feature(like: Tensor, channels_last: bool = False) -> Tensor:
    """A feature of the upgraded model of the size of a hidden one."""
    feature = seeded("upgraded", tuple(like.shape)).to(like.device, like.dtype)
    return feature.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|, over all numbers."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def finish_by_torch(x: Tensor, bias: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    """What `finish.cu` computes, on any device and in any type."""
    x = x + bias[:, None, None]
    x = x if residual is None else x + residual
    return functional.relu(x) if relu else x
