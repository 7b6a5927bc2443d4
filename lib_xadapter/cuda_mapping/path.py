"""Mapping layers on an NVIDIA GPU: a mapping path of prepared weights, fused operations and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..mapping import MappingLayers
from . import output
from .cuda_operations import CudaOperations
from .graphs import Blocks, Captures, GraphCapturer, Uncaptured
from .levels import run_blocks
from .operations import Operations, Unfinished
from .weights import LevelWeights, addresses, prepare

MakeOperations = Callable[[torch.dtype], Operations]


class Runner(Protocol):
    """Runs the blocks of a level: from a capture, or one after the other."""

    def run(self, level: int, blocks: Blocks, feature: Tensor, like: Tensor) -> Unfinished:
        """The blocks on a feature, brought to the device and type of `like`."""


class Device(Protocol):
    """What the path has of the device it runs on."""

    def here(self) -> AbstractContextManager[None]:
        """Around everything that is run there."""

    def turn(self) -> AbstractContextManager[None]:
        """The same, around what writes into memory of the path's own: one after the other, whichever the stream."""

    def wait(self) -> None:
        """Until all that was run there is done."""

    def runner(self) -> Runner:
        """A new one."""


class CudaDevice:
    """One GPU, whose runs wait for one another on whichever streams they are called.

    Args:
        device: "cuda:0", …
        graphs: record CUDA graphs; they need torch's own allocator.
    """

    def __init__(self, device: torch.device, graphs: bool = True) -> None:
        self._device = device
        self._graphs = graphs and torch.cuda.get_allocator_backend() == "native"
        self._done = torch.cuda.Event()

    @contextmanager
    def here(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.autocast("cuda", enabled=False):
            yield

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self.here():
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            yield
            self._done.record(stream)

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def runner(self) -> Runner:
        return Captures(GraphCapturer()) if self._graphs else Uncaptured()


@dataclass(frozen=True)
class Prepared:
    """What belongs to the adapter's weights as they lie now."""

    addresses: tuple[int, ...]
    levels: tuple[LevelWeights, ...]
    operations: Operations
    runner: Runner


class CudaMapping:
    """The mapping layers by cuDNN, cuBLAS and a kernel of our own, in half precision.

    A level's blocks are replayed from a CUDA graph; its last addition runs outside of it, into new memory. So a hidden
    feature is the caller's like any tensor: the next call, on the same level or another, does not touch it.

    Args:
        adapter: on an NVIDIA GPU, in half precision, as `obstacle` asks for; its convolutions become channels-last.
        make_operations: what the blocks are computed by; made anew whenever the adapter was moved.
        graphs: record CUDA graphs.
        device: for tests.
    """

    def __init__(
        self,
        adapter: MappingLayers,
        make_operations: MakeOperations = CudaOperations,
        graphs: bool = True,
        device: Device | None = None,
    ) -> None:
        self._adapter = adapter
        self._make_operations = make_operations
        self._device = device or CudaDevice(adapter.zero_out[0].weight.device, graphs)
        self._prepared: Prepared | None = None

    @property
    def adapter(self) -> MappingLayers:
        return self._adapter

    def hidden(self, level: int, feature: Tensor, time_embedding: Tensor) -> Tensor:
        with self._device.turn():
            prepared = self._prepare()
            weights = prepared.levels[level]
            blocks = partial(run_blocks, prepared.operations, weights)
            unfinished = prepared.runner.run(level, blocks, feature, like=weights.output)
            return prepared.operations.finish(unfinished)

    def residual(self, level: int, hidden: Tensor) -> Tensor:
        with self._device.here():
            return output.residual(self._usable().levels[level].output, hidden)

    def add(self, level: int, feature: Tensor, hidden: Tensor, weight: float) -> Tensor:
        if not output.can_add(feature, hidden):
            return feature + weight * self.residual(level, hidden).to(feature)
        with self._device.here():
            return output.add_residual(self._usable().levels[level].output, feature, hidden, weight)

    def release(self) -> None:
        if self._prepared is not None:
            # a graph must not be destroyed while it runs
            self._device.wait()
            self._prepared = None

    def _usable(self) -> Prepared:
        """Output convolutions are copies: they hold wherever the adapter was moved to since."""
        return self._prepared or self._prepare()

    def _prepare(self) -> Prepared:
        if self._prepared is None or self._prepared.addresses != addresses(self._adapter):
            self.release()
            with torch.inference_mode(False), torch.no_grad():
                levels = prepare(self._adapter)
            operations = self._make_operations(levels[0].output.dtype)
            self._prepared = Prepared(addresses(self._adapter), levels, operations, self._device.runner())
        return self._prepared
