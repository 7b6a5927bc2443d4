"""The blocks of a level as CUDA graphs: launched as one, for every size of feature that came along."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .operations import Unfinished

Blocks = Callable[[Tensor], Unfinished]

MOST_CAPTURES = 24
"""Eight sizes of picture or batch, at three levels each."""

WARM_UP_RUNS = 2
"""cuDNN times its algorithms in the first; nothing of that kind may happen while a graph is captured."""


@dataclass(frozen=True)
class Capture:
    """Blocks that run again on another feature: write into `feature`, `replay`, read `unfinished`."""

    feature: Tensor
    replay: Callable[[], None]
    unfinished: Unfinished


class Capturer(Protocol):
    """Makes captures."""

    def capture(self, blocks: Blocks, feature: Tensor) -> Capture:
        """What `blocks` does to a feature of this shape and type, channels-last; earlier replays are done by then."""


class Captures:
    """The captures of one adapter, by level and shape; those unused for longest are forgotten."""

    def __init__(self, capturer: Capturer, most: int = MOST_CAPTURES) -> None:
        self._capturer = capturer
        self._most = most
        self._captures: OrderedDict[Hashable, Capture] = OrderedDict()

    def run(self, level: int, blocks: Blocks, feature: Tensor, like: Tensor) -> Unfinished:
        """`blocks` of a level on a feature, brought to the device and type of `like`.

        What is returned lies in memory that the next run writes over, on whichever level that is.
        """
        key = (level, tuple(feature.shape))
        if key not in self._captures:
            # tensors that are made in inference mode could not be written into outside of it later on
            with torch.inference_mode(False), torch.no_grad():
                self._captures[key] = self._capturer.capture(blocks, _channels_last(feature, like))
        self._captures.move_to_end(key)
        while len(self._captures) > self._most:
            self._captures.popitem(last=False)
        capture = self._captures[key]
        capture.feature.copy_(feature)
        capture.replay()
        return capture.unfinished


class Uncaptured:
    """Runs the blocks launch by launch: where torch's allocator has no pools for graphs, and to compare with."""

    def run(self, level: int, blocks: Blocks, feature: Tensor, like: Tensor) -> Unfinished:
        return blocks(_channels_last(feature, like))


class GraphCapturer:
    """Records CUDA graphs, on a stream and in a memory pool of its own.

    All graphs share the pool, results included, since each one's result is read before the next is run: the pool is as
    large as the largest of them.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, blocks: Blocks, feature: Tensor) -> Capture:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        # puts the stream back even where the capture fails so badly that `graph` cannot
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_RUNS):
                blocks(feature)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                place = torch.empty_like(feature)
                unfinished = blocks(place)
            capture = Capture(_borrowed(place), graph.replay, _borrowed_all(unfinished))
        before.wait_stream(self._stream)
        return capture


class _Memory:
    """Tells torch of memory on a GPU that belongs to somebody else.

    Source: CUDA Array Interface, version 2; `torch.as_tensor` takes it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": "<i2",  # the interface has no name for bfloat16
            "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def _borrowed(tensor: Tensor) -> Tensor:
    """The same memory, without keeping it from the graphs that are captured later."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)


def _borrowed_all(unfinished: Unfinished) -> Unfinished:
    residual = unfinished.residual
    # the bias is a weight: nothing else is ever written there
    return Unfinished(
        _borrowed(unfinished.convolution), unfinished.bias, None if residual is None else _borrowed(residual)
    )


def _channels_last(feature: Tensor, like: Tensor) -> Tensor:
    return feature.to(like.device, like.dtype).contiguous(memory_format=torch.channels_last)
