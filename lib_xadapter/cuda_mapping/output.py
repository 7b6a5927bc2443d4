"""The output convolution of a level: 1x1, so a matrix product; its bias is a weight of a channel that is always one.

With the product adding to what is there, F_up + weight · (W · hidden + b) is one pass over SDXL's feature and makes no
tensor. F_up may be channels-last or not: the product is taken from either side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operations import is_channels_last, pixels, pixels_with_ones


def residual(output: Tensor, hidden: Tensor) -> Tensor:
    """W · hidden + b, (rows, channels, h, w), channels-last.

    Args:
        output: (channels, channels + BIAS_CHANNELS), W and b.
        hidden: (rows, channels, h, w).
    """
    rows, channels, height, width = hidden.shape
    columns = pixels_with_ones(hidden)
    if columns is None:
        result = torch.addmm(output[:, channels], pixels(hidden).flatten(0, 1), output[:, :channels].T)
    else:
        result = columns.flatten(0, 1) @ output.T
    return result.view(rows, height, width, channels).permute(0, 3, 1, 2)


def can_add(feature: Tensor, hidden: Tensor) -> bool:
    """Whether `add_residual` takes this feature."""
    return (
        (feature.dtype, feature.device, feature.shape) == (hidden.dtype, hidden.device, hidden.shape)
        and (feature.is_contiguous() or is_channels_last(feature))
        and not feature.requires_grad
    )


def add_residual(output: Tensor, feature: Tensor, hidden: Tensor, weight: float) -> Tensor:
    """feature + weight · (W · hidden + b), written into the feature; arguments as for `residual`."""
    columns, bias = pixels_with_ones(hidden), None
    if columns is None:
        channels = hidden.shape[1]
        bias = output[:, channels, None, None]
        output, columns = output[:, :channels], pixels(hidden)
    if feature.is_contiguous():
        rows = output.expand(len(feature), *output.shape)
        feature.flatten(2).baddbmm_(rows, columns.transpose(1, 2), alpha=weight)
    else:
        pixels(feature).flatten(0, 1).addmm_(columns.flatten(0, 1), output.T, alpha=weight)
    # the product first: where it fails, nothing has been written
    return feature if bias is None else feature.add_(bias, alpha=weight)
