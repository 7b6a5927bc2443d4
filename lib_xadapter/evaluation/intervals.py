"""How sure a figure is: 95 % intervals and paired differences by bootstrap over captions.

Captions are drawn with replacement, the same ones for all ways, and all pictures of a caption (its seeds) go together.
An interval is the range of 95 % of the resampled values around their mean, moved to the value itself: a statistic that
depends on the number of distinct pictures, as a Fréchet distance does, is shifted in every resample, and its interval
must not be.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy
from numpy.typing import NDArray

RESAMPLES = 1000
TAIL = 2.5
"""Percent that each side of an interval leaves out."""


class Statistic(Protocol):
    """A figure as a function of how often each caption counts.

    Attributes:
        most_resamples: how many are worth their time; None where they cost next to nothing.
    """

    most_resamples: int | None

    def __call__(self, counts: NDArray[numpy.int64]) -> NDArray[numpy.float64]:
        """(resamples, captions) → (resamples,)."""


class MeanOverCaptions:
    """The mean of values that each picture has by itself.

    Args:
        values: (captions,) or (captions, seeds).
    """

    most_resamples = None

    def __init__(self, values: NDArray) -> None:
        values = numpy.asarray(values, dtype=numpy.float64)
        self._values = values.reshape(len(values), -1).mean(axis=1)

    def __call__(self, counts: NDArray[numpy.int64]) -> NDArray[numpy.float64]:
        return counts @ self._values / counts.sum(axis=1)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; NaN for both ends where one caption is too few for any."""

    value: float
    low: float
    high: float

    @property
    def leaves_out_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Difference:
    """One way less another, on the same captions."""

    one: str
    other: str
    estimate: Estimate


@dataclass(frozen=True)
class Compared:
    """A figure of several ways.

    Attributes:
        estimates: by way.
        differences: of each pair of ways.
        resamples: that the intervals are made of.
    """

    estimates: Mapping[str, Estimate]
    differences: tuple[Difference, ...]
    resamples: int


def compare(statistics: Mapping[str, Statistic], captions: int, resamples: int = RESAMPLES, seed: int = 0) -> Compared:
    """The value of each way with its interval, and the differences.

    Args:
        statistics: by way.
        captions: how many there are.
        resamples: of the bootstrap; less where a statistic allows no more.
        seed: of the draws.
    """
    limits = [statistic.most_resamples for statistic in statistics.values()]
    resamples = min([resamples, *(limit for limit in limits if limit is not None)])
    counts = drawn(captions, resamples, seed)
    everything = numpy.ones((1, captions), dtype=numpy.int64)
    values = {way: float(statistic(everything)[0]) for way, statistic in statistics.items()}
    draws = {way: statistic(counts) for way, statistic in statistics.items()}
    return Compared(
        {way: _estimate(value, draws[way], captions) for way, value in values.items()},
        tuple(
            Difference(one, other, _estimate(values[one] - values[other], draws[one] - draws[other], captions))
            for one, other in itertools.combinations(values, 2)
        ),
        resamples,
    )


def drawn(captions: int, resamples: int, seed: int) -> NDArray[numpy.int64]:
    """(resamples, captions): how often each caption is drawn, with replacement, among as many draws as captions."""
    generator = numpy.random.default_rng(seed)
    return generator.multinomial(captions, numpy.full(captions, 1 / captions), size=resamples)


def _estimate(value: float, resampled: NDArray[numpy.float64], captions: int) -> Estimate:
    if captions < 2 or not len(resampled):
        return Estimate(value, numpy.nan, numpy.nan)
    low, high = numpy.percentile(resampled - resampled.mean(), (TAIL, 100 - TAIL))
    return Estimate(value, value + float(low), value + float(high))
