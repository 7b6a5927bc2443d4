"""Which pictures a batch holds and how each is cropped: a pure function of the seed and the batch's number.

So any number of processes see the same batches, and what goes on later needs no replay.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from ..errors import WrongArgument

MULTIPLE = 16
"""Sides in pixels: the base's are half, and a multiple of 8 themselves."""
BUCKET_STEPS = 16
"""Steps of the sides of buckets within the size of a square (SDXL: 64 of 1024 pixels)."""
LONGEST = 2
"""Of a bucket's longer side, in sizes of the square (SDXL, appendix I: 2048)."""

ORDER, CROPS = 0, 1
"""Second numbers of the seeds, one for each use."""


@dataclass(frozen=True)
class Crop:
    """A part of a picture, in pixels of the upgraded model.

    Attributes:
        example: number of the picture.
        resized: width and height that the whole picture is brought to before it is cropped.
        top, left: first row and column of the part.
        height, width: of the part.
    """

    example: int
    resized: tuple[int, int]
    top: int
    left: int
    height: int
    width: int


class Batches:
    """All batches of a training, by number from 0 on.

    In every epoch each picture is seen at least once; batches that would be too small are filled up with pictures of
    their own bucket. A picture is cropped alike in every epoch, so that its latents can be kept.

    Args:
        sizes: width and height of each picture.
        batch: pictures in each batch, of all processes together.
        seed: of the order and the crops.
        size: of the square crops, in pixels of the upgraded model.
        buckets: crops of about as many pixels in the picture's own aspect ratio instead; a batch is of one ratio.

    Attributes:
        per_epoch: batches in which each picture is seen at least once.

    Raises:
        WrongArgument: batch or size are out of range.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], batch: int, seed: int, size: int, buckets: bool) -> None:
        if batch < 1:
            raise WrongArgument(f"'batch' is {batch}, expected a whole number from 1.")
        if size < MULTIPLE or size % MULTIPLE:
            raise WrongArgument(
                f"'size' is {size}, expected a multiple of {MULTIPLE}, as the base's half of it must be one of 8."
            )
        self._sizes = numpy.asarray(sizes, dtype=numpy.int64).reshape(-1, 2)
        if not len(self._sizes):
            raise WrongArgument("There is no picture to make batches of.")
        self._batch = batch
        self._seed = seed
        self._buckets = _fill_buckets(self._sizes, bucket_sizes(size) if buckets else [(size, size)], batch)
        self.per_epoch: int = sum(math.ceil(len(bucket.members) / batch) for bucket in self._buckets)
        # two epochs meet in what is read ahead
        self._epoch = functools.lru_cache(maxsize=2)(self._order)

    def at(self, number: int) -> tuple[Crop, ...]:
        """The crops of a batch, all of one size."""
        epoch, place = divmod(number, self.per_epoch)
        order = self._epoch(epoch)
        bucket = self._buckets[order.buckets[place]]
        return tuple(self._crop(int(example), bucket.size) for example in order.members[place])

    def _order(self, epoch: int) -> _Order:
        draw = self._generator(ORDER, epoch)
        members = [_filled(bucket.members, self._batch, draw) for bucket in self._buckets]
        buckets = numpy.repeat(numpy.arange(len(members)), [len(rows) for rows in members])
        shuffled = draw.permutation(self.per_epoch)
        return _Order(buckets[shuffled], numpy.concatenate(members)[shuffled])

    def _crop(self, example: int, size: tuple[int, int]) -> Crop:
        (width, height), (target_width, target_height) = self._sizes[example].tolist(), size
        scale = max(target_width / width, target_height / height)
        resized = max(target_width, round(width * scale)), max(target_height, round(height * scale))
        draw = self._generator(CROPS, example)
        left = int(draw.integers(resized[0] - target_width, endpoint=True))
        top = int(draw.integers(resized[1] - target_height, endpoint=True))
        return Crop(example, resized, top, left, target_height, target_width)

    def _generator(self, use: int, number: int) -> numpy.random.Generator:
        return numpy.random.default_rng((self._seed, use, number))


def bucket_sizes(size: int) -> list[tuple[int, int]]:
    """Widths and heights of about size² pixels, from 1:4 to 4:1, wider ones last."""
    step = max(size // BUCKET_STEPS // MULTIPLE, 1) * MULTIPLE
    longest = LONGEST * size
    widths = range(math.ceil(size / LONGEST / step) * step, size + 1, step)
    tall = {(width, min(size * size // width // step * step, longest)) for width in widths}
    both = tall | {(height, width) for width, height in tall}
    return sorted(both, key=lambda sides: (sides[0] / sides[1], sides))


@dataclass(frozen=True)
class _Bucket:
    size: tuple[int, int]
    members: numpy.ndarray


@dataclass(frozen=True)
class _Order:
    """Of an epoch's batches: (batches,) buckets and (batches, pictures) members."""

    buckets: numpy.ndarray
    members: numpy.ndarray


def _fill_buckets(sizes: numpy.ndarray, shapes: Sequence[tuple[int, int]], batch: int) -> list[_Bucket]:
    """Each picture to the bucket nearest in aspect ratio that holds at least a batch, if any does."""
    ratios = numpy.log([width / height for width, height in shapes])
    wanted = numpy.log(sizes[:, 0] / sizes[:, 1])
    open_shapes = numpy.arange(len(shapes))
    while True:
        nearest = open_shapes[_nearest(wanted, ratios[open_shapes])]
        counts = numpy.bincount(nearest, minlength=len(shapes))
        filled = [shape for shape in open_shapes if counts[shape]]
        smallest = min(filled, key=lambda shape: counts[shape])
        if counts[smallest] >= batch or len(filled) == 1:
            return [_Bucket(shapes[shape], numpy.flatnonzero(nearest == shape)) for shape in filled]
        open_shapes = numpy.array([shape for shape in filled if shape != smallest])


def _nearest(wanted: numpy.ndarray, ratios: numpy.ndarray) -> numpy.ndarray:
    """Places of the nearest of ascending ratios."""
    return numpy.searchsorted((ratios[1:] + ratios[:-1]) / 2, wanted)


def _filled(members: numpy.ndarray, batch: int, draw: numpy.random.Generator) -> numpy.ndarray:
    """(batches, pictures) of a bucket: all in a random order, then again until the last batch is full."""
    batches = math.ceil(len(members) / batch)
    rounds = math.ceil(batches * batch / len(members))
    drawn = numpy.concatenate([draw.permutation(members) for _ in range(rounds)])
    return drawn[: batches * batch].reshape(batches, batch)
