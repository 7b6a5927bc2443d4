"""The mapping layers on an NVIDIA GPU, in half precision: channels-last, as tensor cores read, and in few passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from ..mapping import MappingLayers, ResNetBlock
from .finish import Finish, FinishKernel


class ChannelsLastMapping:
    """cuDNN's convolutions in channels-last, and an output product that adds straight into the upgraded feature.

    Args:
        adapter: its convolutions become channels-last where they lie, and stay so wherever it is moved.
    """

    def __init__(self, adapter: MappingLayers) -> None:
        self.adapter = adapter.to(memory_format=torch.channels_last)

    def hidden(self, level: int, feature: Tensor, time_embedding: Tensor | None) -> Tensor:
        with _as_it_is():
            x = feature.to(self.adapter.zero_out[level].weight).contiguous(memory_format=torch.channels_last)
            for block in self.adapter.blocks(level):
                x = self._run(block, x)
            return x

    def residual(self, level: int, hidden: Tensor) -> Tensor:
        with _as_it_is():
            return self.adapter.output(level, hidden)

    def add(self, level: int, feature: Tensor, hidden: Tensor, weight: float) -> Tensor:
        if not _can_add(feature, hidden):
            return feature + weight * self.residual(level, hidden).to(feature)
        with _as_it_is():
            output, bias = self.adapter.zero_out[level].weight[:, :, 0, 0], self.adapter.zero_out[level].bias
            if feature.is_contiguous():
                rows = output.expand(len(feature), *output.shape)
                feature.flatten(2).baddbmm_(rows, _pixels(hidden).transpose(1, 2), alpha=weight)
            else:
                _pixels(feature).flatten(0, 1).addmm_(_pixels(hidden).flatten(0, 1), output.T, alpha=weight)
            # the product first: where it fails, nothing has been written
            return feature.add_(bias[:, None, None], alpha=weight)

    def _run(self, block: ResNetBlock, x: Tensor) -> Tensor:
        return block(x)


class CudaMapping(ChannelsLastMapping):
    """The same, with what follows a convolution in one pass of a kernel of our own.

    Args:
        adapter: on an NVIDIA GPU, in half precision, as `obstacle` asks for.
        finish: for tests.
    """

    def __init__(self, adapter: MappingLayers, finish: Finish | None = None) -> None:
        super().__init__(adapter)
        if finish is not None:
            self._finish = finish

    @cached_property
    def _finish(self) -> Finish:
        weight = self.adapter.zero_out[0].weight
        return FinishKernel(weight.device, weight.dtype)

    def _run(self, block: ResNetBlock, x: Tensor) -> Tensor:
        if block.up_opt is not None:
            op = block.up_opt.op
            x = self._finish(functional.conv_transpose2d(x, op.weight, None, 2, 1, output_padding=1), op.bias)
        if block.in_conv is not None:
            x = self._finish(_convolved(x, block.in_conv), block.in_conv.bias)
        h = self._finish(_convolved(x, block.block1), block.block1.bias, relu=True)
        return self._finish(_convolved(h, block.block2), block.block2.bias, residual=x)


def _convolved(x: Tensor, layer: torch.nn.Conv2d) -> Tensor:
    return functional.conv2d(x, layer.weight, None, padding=layer.padding)


def _pixels(feature: Tensor) -> Tensor:
    """A feature as (rows, pixels, channels), the same memory where it is channels-last."""
    return feature.permute(0, 2, 3, 1).flatten(1, 2)


def _can_add(feature: Tensor, hidden: Tensor) -> bool:
    return (
        (feature.dtype, feature.device, feature.shape) == (hidden.dtype, hidden.device, hidden.shape)
        and (feature.is_contiguous() or feature.is_contiguous(memory_format=torch.channels_last))
        and not feature.requires_grad
    )


@contextmanager
def _as_it_is() -> Iterator[None]:
    """While open, operations run in the type of what they are given, and leave nothing for a gradient."""
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        yield
