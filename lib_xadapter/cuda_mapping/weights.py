"""The weights of mapping layers, laid out for tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..mapping import MappingLayers, ResNetBlock, Upsampling

BIAS_CHANNELS = 8
"""Channels that follow a level's own in what its output convolution reads: a one, which the bias is the weight of, and
zeros up to 16 bytes."""


@dataclass(frozen=True)
class Convolution:
    """Weight (outer, inner, k, k), transposed ones (inner, outer, k, k), channels-last, and bias (outer,)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class BlockWeights:
    """The convolutions of one ResNet block, in the order they run in."""

    upsampling: Convolution | None
    entry: Convolution | None
    first: Convolution
    second: Convolution


@dataclass(frozen=True)
class LevelWeights:
    """The blocks of one level, and its output convolution as a matrix (outer, outer + BIAS_CHANNELS)."""

    blocks: tuple[BlockWeights, ...]
    output: Tensor


def prepare(adapter: MappingLayers) -> tuple[LevelWeights, ...]:
    """The weights of every level.

    The adapter's own convolutions are turned channels-last where they lie, so there is no second copy of them; the
    values stay what they were. Only the output convolutions, packed with their biases, are new.
    """
    adapter.to(memory_format=torch.channels_last)
    return tuple(
        LevelWeights(tuple(map(_block, adapter.blocks(level))), _with_bias(adapter.zero_out[level]))
        for level in range(len(adapter.levels))
    )


def addresses(adapter: MappingLayers) -> tuple[int, ...]:
    """Where the adapter's weights lie: other addresses after it was moved, and what was prepared is void."""
    return tuple(parameter.data_ptr() for parameter in adapter.parameters())


def _block(block: ResNetBlock) -> BlockWeights:
    return BlockWeights(
        upsampling=_convolution(block.up_opt),
        entry=_convolution(block.in_conv),
        first=_convolution(block.block1),
        second=_convolution(block.block2),
    )


def _convolution(layer: Upsampling | nn.Conv2d | None) -> Convolution | None:
    if layer is None:
        return None
    layer = layer.op if isinstance(layer, Upsampling) else layer
    return Convolution(layer.weight.detach(), layer.bias.detach())


def _with_bias(layer: nn.Conv2d) -> Tensor:
    weight = layer.weight.detach()[:, :, 0, 0]
    packed = weight.new_zeros(len(weight), weight.shape[1] + BIAS_CHANNELS)
    packed[:, : weight.shape[1]] = weight
    packed[:, weight.shape[1]] = layer.bias.detach()
    return packed
