"""The ResNet blocks of a level, up to their very last addition."""

from __future__ import annotations

from torch import Tensor

from .operations import Operations, Unfinished
from .weights import BlockWeights, LevelWeights


def run_blocks(operations: Operations, level: LevelWeights, feature: Tensor) -> Unfinished:
    """x = [in_conv]([up](x)), then x + block2(ReLU(block1(x))), block after block.

    Args:
        feature: of the base, (rows, in_channels, h, w), channels-last.

    Returns:
        The last block's sum, unfinished: adding it up is what brings it into the caller's own memory.
    """
    *earlier, last = level.blocks
    x = feature
    for block in earlier:
        x = _enter(operations, block, x)
        x = operations.convolve(_inner(operations, block, x), block.second, residual=x)
    x = _enter(operations, last, x)
    return operations.begin(_inner(operations, last, x), last.second, x)


def _enter(operations: Operations, block: BlockWeights, x: Tensor) -> Tensor:
    if block.upsampling is not None:
        x = operations.upsample(x, block.upsampling)
    return x if block.entry is None else operations.convolve(x, block.entry)


def _inner(operations: Operations, block: BlockWeights, x: Tensor) -> Tensor:
    return operations.convolve(x, block.first, relu=True)
