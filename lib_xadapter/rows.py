"""Which row of the base's batch a row of the upgraded model's batch belongs to.

Classifier-free guidance puts several rows for each image into one batch: one for each cond (several under `AND`), one
for the uncond. Residuals go from cond to cond, from uncond to uncond, from image to image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One row of a UNet batch: the `cond`-th prompt of an image, or its uncond where `cond` is None."""

    image: int
    cond: int | None


def batch_rows(conds_per_image: Sequence[int], with_uncond: bool = True) -> tuple[Row, ...]:
    """The rows of a guidance batch: all conds, image after image, then the unconds."""
    conds = [Row(image, cond) for image, count in enumerate(conds_per_image) for cond in range(count)]
    unconds = [Row(image, None) for image in range(len(conds_per_image))] if with_uncond else []
    return (*conds, *unconds)


def match_rows(upgraded: Sequence[Row], base: Sequence[Row]) -> tuple[tuple[int, ...], ...]:
    """For each upgraded row, the base rows whose residuals it gets (their mean, where there are several).

    The n-th cond of an image gets the n-th cond of the base where both have as many; else each gets all of them. So
    does an uncond where the base's rows have none.
    """
    places = {row: place for place, row in enumerate(base)}

    def sources(row: Row) -> tuple[int, ...]:
        ours = [place for other, place in places.items() if other.image == row.image and other.cond is not None]
        theirs = sum(other.image == row.image and other.cond is not None for other in upgraded)
        alike = row in places if row.cond is None else len(ours) == theirs
        return (places[row],) if alike else tuple(ours)

    return tuple(sources(row) for row in upgraded)


def take_rows(batch: Tensor, places: Sequence[int]) -> Tensor:
    """The rows of a batch at these places: a part of it where they follow one another, otherwise a new tensor.

    Indexing with a list would send it to the GPU and wait for that.
    """
    first, count = places[0], len(places)
    if list(places) == list(range(first, first + count)):
        return batch[first : first + count]
    return torch.stack([batch[place] for place in places])
