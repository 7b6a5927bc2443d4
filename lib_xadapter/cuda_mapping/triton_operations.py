"""The operations with Triton's convolutions where those can be faster, in 16 or 8 bits, and cuDNN's elsewhere."""

from __future__ import annotations

from torch import Tensor

from .operations import Operations, Unfinished
from .triton_convolution import EIGHT_BIT_TILES, SIXTEEN_BIT_TILES, EightBits, Tiles, TritonConvolution, quantize
from .weights import Convolution


class TritonOperations:
    """Every convolution of stride one by Triton, in 16 bits.

    Args:
        other: upsamples, and brings results into the caller's memory.
        tiles: as for `TritonConvolution`.
    """

    def __init__(self, other: Operations, tiles: tuple[Tiles, ...] = SIXTEEN_BIT_TILES) -> None:
        self._other = other
        self._convolve = TritonConvolution(tiles)

    def upsample(self, x: Tensor, convolution: Convolution) -> Tensor:
        return self._other.upsample(x, convolution)

    def convolve(
        self, x: Tensor, convolution: Convolution, relu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        return self._convolve(x, convolution, relu, residual)

    def begin(self, x: Tensor, convolution: Convolution, residual: Tensor) -> Unfinished:
        return Unfinished(self._convolve(x, convolution, residual=residual))

    def finish(self, unfinished: Unfinished) -> Tensor:
        return self._other.finish(unfinished)


class EightBitOperations:
    """The convolutions between equally wide features by Triton in 8 bits; the others, a twelfth of the work, in 16.

    Those have no residual beside them that is left as it was, so their rounding would be felt most.

    Args:
        other: runs everything else.
        tiles: as for `TritonConvolution`.
    """

    def __init__(self, other: Operations, tiles: tuple[Tiles, ...] = EIGHT_BIT_TILES) -> None:
        self._other = other
        self._convolve = TritonConvolution(tiles)
        self._weights: dict[int, EightBits] = {}

    def upsample(self, x: Tensor, convolution: Convolution) -> Tensor:
        return self._other.upsample(x, convolution)

    def convolve(
        self, x: Tensor, convolution: Convolution, relu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        if convolution.weight.shape[0] != convolution.weight.shape[1]:
            return self._other.convolve(x, convolution, relu, residual)
        weight = self._quantized(convolution.weight)
        return self._convolve.in_eight_bits(quantize(x), weight, convolution.bias, relu, residual)

    def begin(self, x: Tensor, convolution: Convolution, residual: Tensor) -> Unfinished:
        return Unfinished(self.convolve(x, convolution, residual=residual))

    def finish(self, unfinished: Unfinished) -> Tensor:
        return self._other.finish(unfinished)

    def _quantized(self, weight: Tensor) -> EightBits:
        """A weight in 8 bits, made once: the operations are as old as the weights' place in memory."""
        if weight.data_ptr() not in self._weights:
            self._weights[weight.data_ptr()] = quantize(weight)
        return self._weights[weight.data_ptr()]
