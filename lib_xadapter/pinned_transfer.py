"""The way of features between a GPU and RAM.

Asynchronous copies need pinned memory. Two slots of it take turns, a step each: one is filled or
emptied here while the GPU copies the other. So two steps' features are pinned, however many steps there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A place in a GPU's queue."""

    def synchronize(self) -> None:
        """Wait until the GPU is there."""


class Queue(Protocol):
    """What copies asynchronously."""

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Pinned memory for a tensor."""

    def on_device_like(self, tensor: Tensor) -> Tensor:
        """Memory of the GPU for a tensor."""

    def copy(self, into: Tensor, tensor: Tensor) -> None:
        """Done once the GPU is at the next event."""

    def event(self) -> Event:
        """Behind all copies up to now."""


class CudaQueue:
    """A GPU's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pinned_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def on_device_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=self._device)

    def copy(self, into: Tensor, tensor: Tensor) -> None:
        into.copy_(tensor, non_blocking=True)

    def event(self) -> Event:
        return torch.cuda.current_stream(self._device).record_event()


@dataclass
class Slot:
    """Pinned memory for the features of one step.

    Attributes:
        tensors: that are used again step after step.
        used: how many of them are in this step.
        leaving: what is copied into RAM once the GPU has been at the event: (pinned, ordinary).
    """

    tensors: list[Tensor] = field(default_factory=list)
    used: int = 0
    leaving: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    event: Event | None = None

    def take(self, queue: Queue, tensor: Tensor) -> Tensor:
        """Memory for one of the step's tensors."""
        there = self.tensors[self.used : self.used + 1]
        if not there or _form(there[0]) != _form(tensor):
            self.tensors[self.used : self.used + 1] = [queue.pinned_like(tensor)]
        self.used += 1
        return self.tensors[self.used - 1]

    def clear(self) -> None:
        """Wait until the GPU has no more to do with it, and bring what it holds to where it belongs."""
        if self.event is not None:
            self.event.synchronize()
        for pinned, ordinary in self.leaving:
            ordinary.copy_(pinned)
        self.used, self.event = 0, None
        self.leaving.clear()


class PinnedTransfer:
    """Brings tensors from or to a device, step by step.

    Args:
        device: a GPU; on any other device tensors are copied at once.
        queue: for tests.
    """

    def __init__(self, device: torch.device, queue: Queue | None = None) -> None:
        self._device = device
        self._queue = queue or (CudaQueue(device) if device.type == "cuda" else None)
        self._slot, self._other = Slot(), Slot()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the copies of one step."""
        self._slot.clear()
        yield
        if self._queue is not None:
            self._slot.event = self._queue.event()
        self._slot, self._other = self._other, self._slot

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in RAM, there once `finish` was called."""
        if self._queue is None:
            return torch.empty_like(tensor, device="cpu").copy_(tensor)
        pinned, ordinary = self._slot.take(self._queue, tensor), torch.empty_like(tensor, device="cpu")
        self._queue.copy(pinned, tensor)
        self._slot.leaving.append((pinned, ordinary))
        return ordinary

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy on the device, for later work there."""
        if self._queue is None:
            return tensor.to(self._device)
        pinned, there = self._slot.take(self._queue, tensor).copy_(tensor), self._queue.on_device_like(tensor)
        self._queue.copy(there, pinned)
        return there

    def finish(self) -> None:
        """Wait until everything is where it belongs."""
        for slot in (self._slot, self._other):
            slot.clear()


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()
