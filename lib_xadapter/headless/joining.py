"""Several jobs' pictures in one batch: rows of prompts and control maps one under the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .pipeline import NoisePerImage, Request

MAPS = "image"
"""The argument of a pipeline's own call that holds what its ControlNets are given."""


def can_join(requests: Sequence[Request]) -> bool:
    """Whether one batch can hold them: from noise, by prompts of one length that do not change on the way."""
    plain = all(
        request.base_conditioning is None
        and request.upgraded_conditioning is None
        and request.start is None
        and request.painted is None
        for request in requests
    )
    return plain and len({_shapes(request) for request in requests}) == 1


def _shapes(request: Request) -> tuple[Any, ...]:
    given = (*request.base.values(), *request.upgraded.values())
    return tuple(value.shape[1:] for value in given if isinstance(value, Tensor))


def joined(requests: Sequence[Request]) -> Request:
    """One request for the pictures of several that differ in prompts, control maps and noise alone.

    Args:
        requests: for which `can_join` is true, each with noise per image.
    """
    first, *others = requests
    if not others:
        return first
    return dataclasses.replace(
        first,
        base=_arguments([(request.base, request.images) for request in requests]),
        upgraded=_arguments([(request.upgraded, request.images) for request in requests]),
        noise=NoisePerImage([noise for request in requests for noise in request.noise.noises]),
        images=sum(request.images for request in requests),
    )


def _arguments(sides: Sequence[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
    first, _ = sides[0]
    return {name: _rows(name, [(given[name], images) for given, images in sides]) for name in first}


def _rows(name: str, values: Sequence[tuple[Any, int]]) -> Any:
    first, _ = values[0]
    if isinstance(first, list) and name == MAPS:
        units = range(len(first))
        return [_rows(name, [(maps[unit], images) for maps, images in values]) for unit in units]
    if isinstance(first, Tensor):
        return torch.cat([value.expand(images, *value.shape[1:]) for value, images in values])
    return first
