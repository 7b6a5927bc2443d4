"""How CUDA graphs are captured and replayed, as torch.cuda is told to; a stand-in notes it where there is no GPU."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy
import pytest
import torch

from lib_xadapter.cuda_mapping import CudaMapping, graphs
from lib_xadapter.cuda_mapping.operations import TorchOperations
from lib_xadapter.cuda_mapping.path import CudaDevice
from tests.cuda.mappings import NO_TIME, base_feature, released


class StandIn:
    """torch.cuda as far as capture needs it, with what happened in `events`."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.current = Stream("caller", self)
        self.capturing = False
        self.allocator = "native"
        self.fails_at_end = False

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert (self.current, pool, capture_error_mode) == (stream, "pool", "thread_local")
        self.events.append("capture")
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
        if self.fails_at_end:
            self.current = stream
            raise RuntimeError("capture failed")

    @contextmanager
    def device(self, device):
        yield


class Stream:
    """A stream, by name."""

    def __init__(self, name: str, cuda: StandIn) -> None:
        self.name, self.cuda = name, cuda

    def wait_stream(self, other) -> None:
        self.cuda.events.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event) -> None:
        self.cuda.events.append(f"{self.name} waits")


@pytest.fixture
def cuda(monkeypatch):
    stand_in = StandIn()
    event = SimpleNamespace(record=lambda stream: stand_in.events.append(f"{stream.name} done"))
    for name, value in {
        "stream": stand_in.stream,
        "graph": stand_in.graph,
        "device": stand_in.device,
        "current_stream": lambda: stand_in.current,
        "Stream": lambda: Stream("side", stand_in),
        "Event": lambda: event,
        "synchronize": lambda device: stand_in.events.append("wait"),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: stand_in.events.append("replay")),
        "graph_pool_handle": lambda: "pool",
        "get_allocator_backend": lambda: stand_in.allocator,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs, "_borrowed", lambda tensor: tensor)
    return stand_in


class NotedOperations(TorchOperations):
    """Note every level's run."""

    def __init__(self, cuda: StandIn) -> None:
        self._cuda = cuda

    def begin(self, *arguments):
        self._cuda.events.append("captured run" if self._cuda.capturing else "run")
        return super().begin(*arguments)


@pytest.fixture
def path(cuda):
    adapter = released()
    return CudaMapping(adapter, lambda dtype: NotedOperations(cuda), device=CudaDevice(torch.device("cpu")))


FEATURE = base_feature(0, (1, 2, 2))


def test_a_shape_is_warmed_up_and_captured_on_a_side_stream_once_and_replayed_on_the_callers(path, cuda):
    path.hidden(0, FEATURE, NO_TIME)
    capture = ["side waits for caller", "run", "run", "capture", "captured run", "caller waits for side"]
    assert cuda.events == ["caller waits", *capture, "replay", "caller done"]
    cuda.events.clear()
    path.hidden(0, FEATURE, NO_TIME)
    assert cuda.events == ["caller waits", "replay", "caller done"]


def test_graphs_are_not_destroyed_while_they_run(path, cuda):
    path.hidden(0, FEATURE, NO_TIME)
    cuda.events.clear()
    path.release()
    path.release()
    assert cuda.events == ["wait"]


def test_another_stream_waits_for_the_last_run(path, cuda):
    path.hidden(0, FEATURE, NO_TIME)
    cuda.events.clear()
    with cuda.stream(Stream("other", cuda)):
        path.hidden(0, FEATURE, NO_TIME)
    assert cuda.events == ["other waits", "replay", "other done"]


def test_a_capture_that_fails_leaves_the_callers_stream_current(path, cuda):
    cuda.fails_at_end = True
    caller = cuda.current
    with pytest.raises(RuntimeError, match="capture failed"):
        path.hidden(0, FEATURE, NO_TIME)
    assert cuda.current is caller


def test_without_torchs_own_allocator_nothing_is_captured(cuda):
    cuda.allocator = "cudaMallocAsync"
    path = CudaMapping(released(), lambda dtype: NotedOperations(cuda), device=CudaDevice(torch.device("cpu")))
    path.hidden(0, FEATURE, NO_TIME)
    assert cuda.events == ["caller waits", "run", "caller done"]


def test_memory_is_told_as_the_array_interface_has_it():
    feature = base_feature(1, (2, 3, 5)).half().contiguous(memory_format=torch.channels_last)
    interface = graphs._Memory(feature).__cuda_array_interface__
    # numpy's interface has the same fields
    same = numpy.asarray(SimpleNamespace(__array_interface__=interface))
    assert same.ctypes.data == feature.data_ptr()
    assert torch.equal(torch.from_numpy(same).view(torch.float16), feature)
