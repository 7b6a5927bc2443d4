"""The few operations that the blocks of a level are made of, for whoever computes them.

Every feature is (rows, channels, h, w) in channels-last memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .weights import BIAS_CHANNELS, Convolution


@dataclass(frozen=True)
class Unfinished:
    """What a convolution gave, and what is still to be added to it: bias (channels,), residual of the same size."""

    convolution: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None


class Operations(Protocol):
    """Convolutions with what follows them."""

    def upsample(self, x: Tensor, convolution: Convolution) -> Tensor:
        """The transposed convolution to twice the height and width, with its bias."""

    def convolve(
        self, x: Tensor, convolution: Convolution, relu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """ReLU(W * x + b + residual); a new tensor."""

    def begin(self, x: Tensor, convolution: Convolution, residual: Tensor) -> Unfinished:
        """W * x + b + residual, with as much left to `finish` as that can do on its way."""

    def finish(self, unfinished: Unfinished) -> Tensor:
        """The sum, (rows, channels, h, w), in new memory where `bias_row` finds a one behind each pixel's channels."""


class TorchOperations:
    """The operations as torch has them, on any device and in any type: what the others are held against."""

    def upsample(self, x: Tensor, convolution: Convolution) -> Tensor:
        return functional.conv_transpose2d(
            x, convolution.weight, convolution.bias, stride=2, padding=1, output_padding=1
        )

    def convolve(
        self, x: Tensor, convolution: Convolution, relu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        weight = convolution.weight
        result = functional.conv2d(x, weight, convolution.bias, padding=weight.shape[-1] // 2)
        result = result if residual is None else result + residual
        return functional.relu(result) if relu else result

    def begin(self, x: Tensor, convolution: Convolution, residual: Tensor) -> Unfinished:
        weight = convolution.weight
        return Unfinished(functional.conv2d(x, weight, padding=weight.shape[-1] // 2), convolution.bias, residual)

    def finish(self, unfinished: Unfinished) -> Tensor:
        memory = hidden_memory(unfinished.convolution)
        hidden = as_hidden(memory)
        hidden.copy_(unfinished.convolution)
        if unfinished.bias is not None:
            hidden += unfinished.bias[:, None, None]
        if unfinished.residual is not None:
            hidden += unfinished.residual
        channels = hidden.shape[1]
        memory[..., channels] = 1
        memory[..., channels + 1 :] = 0
        return hidden


def hidden_memory(like: Tensor) -> Tensor:
    """Room for a hidden feature of the size of `like`: (rows, h, w, channels + BIAS_CHANNELS)."""
    rows, channels, height, width = like.shape
    return like.new_empty(rows, height, width, channels + BIAS_CHANNELS)


def as_hidden(memory: Tensor) -> Tensor:
    """What `hidden_memory` made, as (rows, channels, h, w)."""
    return memory[..., :-BIAS_CHANNELS].permute(0, 3, 1, 2)


def pixels_with_ones(hidden: Tensor) -> Tensor | None:
    """A hidden feature as (rows, pixels, channels + BIAS_CHANNELS), the same memory.

    None where there is nothing behind the channels: what was averaged or copied is laid out in another way. Of a single
    pixel's strides a copy keeps all, and they tell nothing.
    """
    rows, channels, height, width = hidden.shape
    pitch = channels + BIAS_CHANNELS
    strides = (height * width * pitch, 1, width * pitch, pitch)
    if hidden.stride() != strides or rows * height * width == 1:
        return None
    return hidden.as_strided((rows, height * width, pitch), (height * width * pitch, pitch, 1))


def pixels(feature: Tensor) -> Tensor:
    """A feature as (rows, pixels, channels), the same memory where it is channels-last."""
    return feature.permute(0, 2, 3, 1).flatten(1, 2)


def is_channels_last(feature: Tensor) -> bool:
    """Whether channels-last kernels may read the memory; for one channel or pixel both layouts are the same."""
    return feature.is_contiguous(memory_format=torch.channels_last)
