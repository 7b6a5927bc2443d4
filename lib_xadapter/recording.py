"""The base's joint stage run before the upgraded model's, its features kept in RAM, to the bit.

At 1024 px they are about 10.5 MB an image, CFG half and step in half precision, which UNets run in on a GPU. The two
models then never need the GPU at the same time, and as long as nothing changes on the base's side, the upgraded model
can be run again without the base: with another weight, another prompt of its own, other LoRAs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .errors import UnplannedLevel
from .evaluations import Evaluation, distinct_levels, same_level
from .feature_sources import FeatureSource, RowFeatures
from .memory import free_ram
from .pinned_transfer import PinnedTransfer
from .taps import TAPS, BaseFeatures, Taps, base_modules, base_strides, output_channels


@dataclass(frozen=True)
class RecordedStep:
    """What the base's decoder gave at a noise level, in RAM."""

    sigma: float
    row_features: RowFeatures


@dataclass(frozen=True)
class Recording:
    """The base's features at every noise level that the upgraded model's sampler will ask for, in that order."""

    steps: tuple[RecordedStep, ...]

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return sum(_size(step.row_features.features) for step in self.steps)


def expected_size(
    base_unet: nn.Module, rows: int, latent_size: tuple[int, int], evaluations: int, taps: Taps = TAPS
) -> int:
    """Bytes of a recording, before the base runs.

    Args:
        base_unet: whose features are recorded.
        rows: of its batch: one for each image and CFG half.
        latent_size: (height, width) of its latent.
        evaluations: at which it is recorded.
        taps: where its features are read.
    """
    levels = zip(map(output_channels, base_modules(base_unet, taps)), base_strides(base_unet, taps), strict=True)
    height, width = latent_size
    numbers = sum(channels * -(-height // stride) * -(-width // stride) for channels, stride in levels)
    return rows * numbers * evaluations * next(base_unet.parameters()).element_size()


class Recorder:
    """A source of features that copies them to RAM as they pass.

    Args:
        source: the base in lockstep.
        evaluations: those at which the base is going to be run.
        has_room: whether so many bytes of RAM may be filled, asked before the first copy; if not, none is
            made.
        time_embedding: whether the mapping layers use it, so that it is copied, too.
    """

    def __init__(
        self,
        source: FeatureSource,
        evaluations: Sequence[Evaluation],
        has_room: Callable[[int], bool],
        time_embedding: bool = True,
    ) -> None:
        self._source = source
        self._levels = [evaluation.sigma for evaluation in distinct_levels(evaluations)]
        self._has_room, self._time_embedding = has_room, time_embedding
        self._steps: list[RecordedStep] = []
        self._transfer: PinnedTransfer | None = None

    def at(self, evaluation: Evaluation) -> RowFeatures:
        """The source's features, as they are."""
        found = self._source.at(evaluation)
        if self._is_next(evaluation.sigma):
            features = found.features if self._time_embedding else replace(found.features, time_embedding=None)
            self._copy(evaluation.sigma, RowFeatures(features, found.rows))
        return found

    def recording(self) -> Recording | None:
        """What was copied; None where that is not every level."""
        if len(self._steps) != len(self._levels):
            return None
        if self._transfer is not None:
            self._transfer.finish()
        return Recording(tuple(self._steps))

    def _is_next(self, sigma: float) -> bool:
        place = len(self._steps)
        return place < len(self._levels) and same_level(self._levels[place], sigma)

    def _copy(self, sigma: float, found: RowFeatures) -> None:
        features = found.features
        if self._transfer is None:
            if not self._has_room(len(self._levels) * _size(features)):
                return
            self._transfer = PinnedTransfer(features.levels[0].device)
        with self._transfer.step():
            self._steps.append(RecordedStep(sigma, RowFeatures(_moved(features, self._transfer.to_host), found.rows)))


def record(
    source: FeatureSource,
    evaluations: Sequence[Evaluation],
    each: Callable[[], None] = lambda: None,
    time_embedding: bool = True,
    reserve: Callable[[int], None] = lambda size: None,
) -> Recording:
    """Run the base through evaluations.

    Args:
        source: the base in lockstep.
        evaluations: those at which the base is run.
        each: called before each of them.
        time_embedding: whether the mapping layers use it, so that it is recorded, too.
        reserve: called with the bytes of RAM that the recording fills at most, before the first copy.
    """
    at_levels = distinct_levels(evaluations)

    def always(size: int) -> bool:
        reserve(size)
        return True

    recorder = Recorder(source, at_levels, always, time_embedding)
    for evaluation in at_levels:
        each()
        recorder.at(evaluation)
    return recorder.recording()


class Playback:
    """A recording as a source of features, in the order in which it was made.

    Args:
        recording: of the same sampler and steps.
        device: where the mapping layers run.
    """

    def __init__(self, recording: Recording, device: torch.device | str) -> None:
        self._steps = iter(recording.steps)
        self._transfer = PinnedTransfer(torch.device(device))

    def at(self, evaluation: Evaluation) -> RowFeatures:
        """The features recorded at this noise level.

        Raises:
            UnplannedLevel: another level comes next, or none.
        """
        sigma = evaluation.sigma
        step = next(self._steps, None)
        if step is None or not same_level(step.sigma, sigma):
            raise UnplannedLevel(
                f"the sampler asks for the noise level {sigma:g}, where "
                f"{'nothing more' if step is None else f'{step.sigma:g}'} was recorded"
            )
        with self._transfer.step():
            features = _moved(step.row_features.features, self._transfer.to_device)
        return RowFeatures(features, step.row_features.rows)


class Sized(Protocol):
    """Something that fills RAM."""

    @property
    def size(self) -> int:
        """In bytes."""


Entry = TypeVar("Entry", bound=Sized)


class LeastRecentlyUsed(Generic[Entry]):
    """Recordings kept for later, the longest unused of them given up where they fill more than they may.

    Args:
        capacity: tells how many bytes they may fill, each time one is put away.
    """

    def __init__(self, capacity: Callable[[], int]) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[Hashable, Entry] = OrderedDict()

    def has_room(self, size: int) -> bool:
        """Whether something of this size may be kept, and fits into what is free of RAM."""
        return size <= min(self._capacity(), free_ram())

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return sum(kept.size for kept in self._kept.values())

    def find(self, key: Hashable) -> Entry | None:
        """What was put away under the key, None where it is not there or no longer."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def make_room(self, size: int) -> None:
        """Give up as much as has to go before something of this size may come."""
        capacity = self._capacity()
        while self._kept and (self.size > capacity or size <= capacity < self.size + size):
            self._kept.popitem(last=False)

    def put(self, key: Hashable, made: Entry) -> None:
        """Put away; what does not fit alone is not kept at all."""
        self._kept.pop(key, None)
        self.make_room(made.size)
        if made.size <= self._capacity():
            self._kept[key] = made


def _size(features: BaseFeatures) -> int:
    return sum(tensor.nbytes for tensor in (*features.levels, features.time_embedding) if tensor is not None)


def _moved(features: BaseFeatures, move: Callable[[Tensor], Tensor]) -> BaseFeatures:
    embedding = features.time_embedding
    return BaseFeatures(tuple(map(move, features.levels)), None if embedding is None else move(embedding))
