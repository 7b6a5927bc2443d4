"""The base and its mapping layers on a CUDA stream beside the upgraded model's encoder, which does not need them.

The upgraded model's middle block is the first that does. So the base's work is put onto its stream only when that block
asks: by then the encoder's work is in the queue, and the GPU has both at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Overlap(Protocol):
    """Runs the base's work beside the upgraded model's."""

    def begin(self) -> None:
        """A model evaluation begins: later work on the side stream waits for all work queued up to here."""

    def on_side_stream(self) -> AbstractContextManager[None]:
        """While open, work is queued on the side stream."""

    def finished(self) -> object:
        """An event behind all work that is on the side stream by now."""

    def wait_for(self, event: object, tensor: Tensor) -> None:
        """Later work waits for this event, and may use a tensor that was made on the side stream."""

    def end(self) -> None:
        """Later work waits for everything on the side stream."""


class SideStream:
    """An `Overlap` on a CUDA stream of its own.

    Args:
        device: the GPU that both models are on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._begun = torch.cuda.Event()

    def begin(self) -> None:
        self._begun.record(torch.cuda.current_stream(self._device))

    @contextmanager
    def on_side_stream(self) -> Iterator[None]:
        self._stream.wait_event(self._begun)
        with torch.cuda.stream(self._stream):
            yield

    def finished(self) -> torch.cuda.Event:
        return self._stream.record_event()

    def wait_for(self, event: torch.cuda.Event, tensor: Tensor) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        # else its memory could be given to other work on the side stream while it is still being read
        tensor.record_stream(current)

    def end(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
