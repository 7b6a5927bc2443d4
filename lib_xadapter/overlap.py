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
    """Where the base's work goes while the upgraded model's is under way."""

    def begin(self) -> None:
        """A model evaluation begins: what is aside comes after all that was asked for up to here."""

    def aside(self) -> AbstractContextManager[None]:
        """While open, work is put aside."""

    def finished(self) -> object:
        """A mark behind all the work that is aside by now."""

    def wait_for(self, mark: object, tensor: Tensor) -> None:
        """What is asked for from now on comes after the mark, and may use a tensor that was made aside."""

    def end(self) -> None:
        """What is asked for from now on comes after everything that is aside."""


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
    def aside(self) -> Iterator[None]:
        self._stream.wait_event(self._begun)
        with torch.cuda.stream(self._stream):
            yield

    def finished(self) -> torch.cuda.Event:
        return self._stream.record_event()

    def wait_for(self, mark: torch.cuda.Event, tensor: Tensor) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(mark)
        # else its memory could be given to other work aside while it is still being read
        tensor.record_stream(current)

    def end(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
