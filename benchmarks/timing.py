"""Works timed in turns, so that whatever slows the machine down in passing meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """The median of what was measured, and the quartiles around it."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Times:
    """How long a work took, in seconds, round after round."""

    seconds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        return Spread.of(self.seconds)

    def __add__(self, other: Times) -> Times:
        """Both works, one after the other."""
        return Times(tuple(one + more for one, more in zip(self.seconds, other.seconds, strict=True)))

    def over(self, other: Times) -> Spread:
        """The ratio to another work, taken in each round."""
        return Spread.of(one / another for one, another in zip(self.seconds, other.seconds, strict=True))


WALL, PROCESSOR = "wall", "processor"
"""Which time is taken where there is no GPU: what passes, or what the process was given of a shared processor."""


@dataclass(frozen=True)
class Turns:
    """How works are timed.

    Attributes:
        device: where they run; on a GPU the time is that between two events in its queue.
        rounds: that count.
        warm_up: rounds before those.
        clock: "wall" or "processor".
        calls: of a work each time it is timed, one right after the other; what is given is the time of one of them.
    """

    device: torch.device
    rounds: int
    warm_up: int = 1
    clock: str = WALL
    calls: int = 1

    def times(self, works: Mapping[str, Work]) -> dict[str, Times]:
        """Each work once a round; every other round in reverse order, so that none always follows the same one."""
        taken: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(-self.warm_up, self.rounds):
            for name in works if turn % 2 == 0 else reversed(works):
                seconds = self.seconds_of(works[name])
                if turn >= 0:
                    taken[name].append(seconds)
        return {name: Times(tuple(seconds)) for name, seconds in taken.items()}

    def seconds_of(self, work: Work) -> float:
        """How long a work takes, until its last result is there."""
        if self.device.type == "cuda":
            return self._seconds_on_gpu(work)
        clock = time.process_time if self.clock == PROCESSOR else time.perf_counter
        begin = clock()
        self._call(work)
        return (clock() - begin) / self.calls

    def _seconds_on_gpu(self, work: Work) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        self._call(work)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / self.calls

    def _call(self, work: Work) -> None:
        for _ in range(self.calls):
            work()
