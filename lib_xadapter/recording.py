"""The base's joint stage run before the upgraded model's, its features kept in host memory, to the bit.

At 1024 px they are about 10.5 MB an image, CFG half and step in half precision, which UNets run in on a GPU. The two
models then never need the GPU at the same time, and as long as nothing changes on the base's side, the upgraded model
can be run again without the base: with another weight, another prompt of its own, other LoRAs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .errors import XAdapterError
from .evaluations import Evaluation
from .feature_sources import FeatureSource, RowFeatures
from .taps import BaseFeatures, base_modules, base_strides, output_channels
from .trajectory import same_level


@dataclass(frozen=True)
class RecordedStep:
    """What the base's decoder gave at a noise level, in host memory."""

    sigma: float
    found: RowFeatures


@dataclass(frozen=True)
class Recording:
    """The base's features at every noise level that the upgraded model's sampler will ask for, in that order."""

    steps: tuple[RecordedStep, ...]

    @property
    def size(self) -> int:
        """Bytes of host memory."""
        return sum(_room_for(tensor) for step in self.steps for tensor in _tensors(step.found.features))


def expected_size(base_unet: nn.Module, rows: int, latent_size: tuple[int, int], evaluations: int) -> int:
    """Bytes of a recording, before the base runs.

    Args:
        base_unet: whose features are recorded.
        rows: of its batch: one for each image and CFG half.
        latent_size: (height, width) of its latent.
        evaluations: at which it is recorded.
    """
    levels = zip(map(output_channels, base_modules(base_unet)), base_strides(base_unet), strict=True)
    height, width = latent_size
    numbers = sum(channels * -(-height // stride) * -(-width // stride) for channels, stride in levels)
    return rows * numbers * evaluations * next(base_unet.parameters()).element_size()


class Recorder:
    """A source of features that copies them to host memory as they pass.

    Args:
        source: the base in lockstep.
        evaluations: those at which the base is going to be run.
        room: bytes that the copies may fill; where they would need more, none are made. None: no limit.
    """

    def __init__(self, source: FeatureSource, evaluations: Sequence[Evaluation], room: int | None = None) -> None:
        self._source = source
        self._levels = [evaluation.sigma for evaluation in _distinct(evaluations)]
        self._room = room
        self._steps: list[RecordedStep] = []

    def at(self, evaluation: Evaluation) -> RowFeatures:
        """The source's features, as they are."""
        found = self._source.at(evaluation)
        if self._is_wanted(evaluation.sigma, found):
            moved = RowFeatures(_moved(found.features, _to_host), found.rows)
            self._steps.append(RecordedStep(evaluation.sigma, moved))
            self._device = found.features.time_embedding.device
        return found

    def recording(self) -> Recording | None:
        """What was copied; None where that is not every level."""
        if len(self._steps) != len(self._levels):
            return None
        if self._steps and self._device.type == "cuda":
            # the copies are under way until then
            torch.cuda.synchronize(self._device)
        return Recording(tuple(self._steps))

    def _is_wanted(self, sigma: float, found: RowFeatures) -> bool:
        place = len(self._steps)
        if place == len(self._levels) or not same_level(self._levels[place], sigma):
            return False
        if place == 0 and self._room is not None:
            return len(self._levels) * sum(tensor.nbytes for tensor in _tensors(found.features)) <= self._room
        return True


def record(
    source: FeatureSource, evaluations: Iterable[Evaluation], each: Callable[[], None] = lambda: None
) -> Recording:
    """Run the base through evaluations.

    Args:
        source: the base in lockstep.
        evaluations: those at which the base is run.
        each: called before each of them.
    """
    wanted = _distinct(evaluations)
    recorder = Recorder(source, wanted)
    for evaluation in wanted:
        each()
        recorder.at(evaluation)
    return recorder.recording()


def _distinct(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Samplers of second order end a step and begin the next at one level."""
    found: list[Evaluation] = []
    for evaluation in evaluations:
        if not found or not same_level(found[-1].sigma, evaluation.sigma):
            found.append(evaluation)
    return found


class Playback:
    """A recording as a source of features, in the order in which it was made.

    Args:
        recording: of the same sampler and steps.
        device: where the mapping layers run.
    """

    def __init__(self, recording: Recording, device: torch.device | str) -> None:
        self._steps = iter(recording.steps)
        self._device = device
        self._latest: tuple[float, RowFeatures] | None = None

    def at(self, evaluation: Evaluation) -> RowFeatures:
        """The features recorded at this noise level.

        Raises:
            XAdapterError: another level comes next, or none.
        """
        sigma = evaluation.sigma
        if self._latest is not None and same_level(self._latest[0], sigma):
            return self._latest[1]
        step = next(self._steps, None)
        if step is None or not same_level(step.sigma, sigma):
            raise XAdapterError(
                f"The sampler asks for the noise level {sigma:g}, where "
                f"{'nothing more' if step is None else f'{step.sigma:g}'} was recorded: set 'memory' to 'lockstep'."
            )
        features = _moved(step.found.features, lambda tensor: tensor.to(self._device, non_blocking=True))
        self._latest = (sigma, RowFeatures(features, step.found.rows))
        return self._latest[1]


class Sized(Protocol):
    """Something that fills host memory."""

    @property
    def size(self) -> int:
        """In bytes."""


Kept = TypeVar("Kept", bound=Sized)


class RecordingCache(Generic[Kept]):
    """Recordings kept for later, the longest unused of them given up where they fill more than they may.

    Args:
        capacity: tells how many bytes they may fill, each time one is put away.
    """

    def __init__(self, capacity: Callable[[], int]) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()

    @property
    def capacity(self) -> int:
        """Bytes that they may fill."""
        return self._capacity()

    @property
    def size(self) -> int:
        """Bytes of host memory."""
        return sum(kept.size for kept in self._kept.values())

    def find(self, key: Hashable) -> Kept | None:
        """What was put away under the key, None where it is not there or no longer."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, made: Kept) -> None:
        """Put away; what does not fit alone is not kept at all."""
        self._kept.pop(key, None)
        capacity = self._capacity()
        if made.size <= capacity:
            self._kept[key] = made
        while self.size > capacity:
            self._kept.popitem(last=False)


def _tensors(features: BaseFeatures) -> tuple[Tensor, ...]:
    return (*features.levels, features.time_embedding)


def _moved(features: BaseFeatures, move: Callable[[Tensor], Tensor]) -> BaseFeatures:
    return BaseFeatures(tuple(map(move, features.levels)), move(features.time_embedding))


def _room_for(tensor: Tensor) -> int:
    """Bytes that a tensor takes: torch gives pinned memory out in powers of two."""
    return 1 << (tensor.nbytes - 1).bit_length() if tensor.is_pinned() else tensor.nbytes


def _to_host(tensor: Tensor) -> Tensor:
    """A copy to the bit; pinned where it comes from a GPU, so that it can be copied back in passing."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
