"""Ways to run the mapping layers: the same maths, by other kernels.

A level is run in two parts. `hidden` is everything up to its output convolution and depends on the base alone; `add` is
that 1x1 convolution together with what happens to its result, F_up + weight · (W · hidden + b), once for each call of
the upgraded UNet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from .mapping import MappingLayers


class MappingPath(Protocol):
    """A way to run mapping layers."""

    @property
    def adapter(self) -> MappingLayers:
        """The mapping layers that are run."""

    def hidden(self, level: int, feature: Tensor, time_embedding: Tensor | None) -> Tensor:
        """What the ResNet blocks of a level give.

        Args:
            level: of the mapping layers.
            feature: of the base, (rows, in_channels[level], h, w), in any type.
            time_embedding: of the base, (rows, channels), for mapping layers with timestep conditioning.

        Returns:
            (rows, out_channels[level], h, w), twice h and w where the level upsamples; the caller's to keep.
        """

    def residual(self, level: int, hidden: Tensor) -> Tensor:
        """What a level's output convolutions make of `hidden`, of its size: W · hidden + b, or a shift and a scale."""

    def add(self, level: int, feature: Tensor, hidden: Tensor, weight: float) -> Tensor:
        """feature + weight · residual, in the feature's type and of its size.

        Args:
            feature: of the upgraded model, (rows, out_channels[level], h, w); it may be written into and returned.
            hidden: of the same size.
            weight: of the level.
        """


class EagerMapping:
    """The mapping layers as torch runs them, on any device and in any type: the reference for every other path."""

    def __init__(self, adapter: MappingLayers) -> None:
        self.adapter = adapter

    def hidden(self, level: int, feature: Tensor, time_embedding: Tensor | None) -> Tensor:
        weight = self.adapter.zero_out[level].weight
        embedding = None if time_embedding is None else time_embedding.to(weight)
        return self.adapter.hidden(level, feature.to(weight), embedding)

    def residual(self, level: int, hidden: Tensor) -> Tensor:
        return self.adapter.output(level, hidden)

    def add(self, level: int, feature: Tensor, hidden: Tensor, weight: float) -> Tensor:
        return feature + weight * self.residual(level, hidden).to(feature)
