"""Features come through two slots of pinned memory as they were, though the GPU copies later than it is told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from lib_xadapter.pinned_transfer import PinnedTransfer

SHAPES = ((2, 8, 4, 4), (2, 4, 8, 8), (2, 16))


@dataclass
class Late:
    """An event: what was queued before it happens when it is waited for."""

    queued: list[Callable[[], None]]

    def synchronize(self) -> None:
        while self.queued:
            self.queued.pop(0)()


@dataclass
class LateGpu:
    """A GPU that does nothing until somebody waits for it; its memory is the CPU's."""

    queued: list[Callable[[], None]] = field(default_factory=list)
    pinned: list[torch.Tensor] = field(default_factory=list)

    def pinned_like(self, tensor):
        self.pinned.append(torch.full_like(tensor, float("nan")))
        return self.pinned[-1]

    def on_device_like(self, tensor):
        return torch.full_like(tensor, float("nan"))

    def copy(self, into, tensor):
        self.queued.append(lambda: into.copy_(tensor))

    def event(self):
        return Late(self.queued)


@pytest.fixture
def gpu() -> LateGpu:
    return LateGpu()


def features(step: int) -> list[torch.Tensor]:
    return [torch.full(shape, float(step + 1)) for shape in SHAPES]


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_what_leaves_the_gpu_arrives_to_the_bit(gpu, steps):
    transfer = PinnedTransfer(torch.device("cuda"), gpu)
    arrived = []
    for step in range(steps):
        with transfer.step():
            arrived.append([transfer.to_host(tensor) for tensor in features(step)])
    transfer.finish()
    for step, tensors in enumerate(arrived):
        assert all(torch.equal(one, other) for one, other in zip(tensors, features(step), strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_what_comes_to_the_gpu_arrives_to_the_bit(gpu, steps):
    transfer = PinnedTransfer(torch.device("cuda"), gpu)
    arrived = []
    for step in range(steps):
        with transfer.step():
            arrived.append([transfer.to_device(tensor) for tensor in features(step)])
    gpu.event().synchronize()
    for step, tensors in enumerate(arrived):
        assert all(torch.equal(one, other) for one, other in zip(tensors, features(step), strict=True))


@pytest.mark.parametrize("direction", ["to_host", "to_device"])
def test_two_steps_are_pinned_and_no_more(gpu, direction):
    transfer = PinnedTransfer(torch.device("cuda"), gpu)
    for step in range(9):
        with transfer.step():
            for tensor in features(step):
                getattr(transfer, direction)(tensor)
    assert len(gpu.pinned) == 2 * len(SHAPES)


def test_without_a_gpu_nothing_is_pinned():
    transfer = PinnedTransfer(torch.device("cpu"))
    tensor = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    with transfer.step():
        arrived = transfer.to_host(tensor)
    assert torch.equal(arrived, tensor)
    assert arrived.stride() == tensor.stride()
    assert arrived.data_ptr() != tensor.data_ptr()


def test_features_of_another_size_get_memory_of_their_own(gpu):
    transfer = PinnedTransfer(torch.device("cuda"), gpu)
    arrived = []
    for size in (2, 2, 3, 3, 3):
        with transfer.step():
            arrived.append(transfer.to_host(torch.full((size,), float(size))))
    transfer.finish()
    assert [tensor.tolist() for tensor in arrived] == [[float(size)] * size for size in (2, 2, 3, 3, 3)]
