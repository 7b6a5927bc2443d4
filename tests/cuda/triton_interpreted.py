"""What Triton's interpreter makes of our kernels, for tests of theirs: writes JSON. Run with TRITON_INTERPRET=1.

Relative errors by name: of sixteen bits against float64; of eight bits against the same in torch, and against float64.
"""

from __future__ import annotations

import itertools
import json
import sys

import torch

from lib_xadapter.cuda_mapping import CudaMapping, triton_operations
from lib_xadapter.cuda_mapping.operations import TorchOperations
from lib_xadapter.cuda_mapping.triton_convolution import EightBits, Tiles, TritonConvolution, quantize
from lib_xadapter.cuda_mapping.weights import Convolution
from tests.cuda.mappings import NO_TIME, OnTheCpu, base_feature, relative_error, released
from tests.seeded import seeded, seeded_weight
from tests.small_adapter import AdapterPlan

ODD_TILES = Tiles(pixels=16, channels=32, depth=16, warps=4, stages=2)
"""Smaller than the features, and dividing none of them."""

WIDE_TILES = Tiles(pixels=64, channels=64, depth=64, warps=4, stages=2)

SMALL = AdapterPlan(in_channels=(64, 32, 16), out_channels=(64, 64, 32))


def main() -> None:
    """Write every error."""
    results = {"sixteen_bits": {}, "eight_bits": {}, "quantizing": quantizing(), "levels": {}, "eight_bit_levels": {}}
    for kernel, relu, has_residual in itertools.product((1, 3), (False, True), (False, True)):
        name = f"{kernel}x{kernel}{'_relu' if relu else ''}{'_residual' if has_residual else ''}"
        results["sixteen_bits"][name], results["eight_bits"][name] = convolving(kernel, relu, has_residual)
    # the interpreter rounds 127.3 to 64: a mantissa that overflows does not raise its exponent
    triton_operations.quantize = quantize_by_torch
    other = TorchOperations()
    for level in range(3):
        sixteen = triton_operations.TritonOperations(other, (WIDE_TILES,))
        results["levels"][level] = running_a_level(level, sixteen)
        eight = triton_operations.EightBitOperations(other, (WIDE_TILES,))
        results["eight_bit_levels"][level] = running_a_level(level, eight)
    sys.stdout.write(json.dumps(results))


def convolving(kernel: int, relu: bool, has_residual: bool) -> tuple[float, float]:
    """Of one convolution in 16 and in 8 bits, at odd sizes."""
    x = channels_last("x", (2, 24, 3, 5))
    convolution = Convolution(
        seeded_weight("w", (40, 24, kernel, kernel)).half().contiguous(memory_format=torch.channels_last),
        seeded_weight("b", (40,)).half(),
    )
    residual = channels_last("residual", (2, 40, 3, 5)) if has_residual else None
    convolve = TritonConvolution((ODD_TILES,))
    sixteen = relative_error(
        convolve(x, convolution, relu, residual), exactly(x, convolution.weight, convolution.bias, relu, residual)
    )
    eight_x, eight_w = quantize_by_torch(x), quantize_by_torch(convolution.weight)
    expected = exactly(original(eight_x), original(eight_w), convolution.bias, relu, residual)
    eight = relative_error(convolve.in_eight_bits(eight_x, eight_w, convolution.bias, relu, residual), expected)
    return sixteen, eight


def quantizing() -> float:
    """Of numbers that 8 bits hold exactly, whatever the row's scale; a row of zeros is one."""
    exact = torch.tensor([0.0, 448.0, -448.0, 1.5, -0.40625, 0.015625, 240.0, 13.0]).repeat(40)
    rows = torch.stack([exact, exact / 2, -exact * 16, exact * 0]).half().view(4, 8, 8, 5)
    return float((original(quantize(rows)) - rows).abs().max())


def running_a_level(level: int, operations: object) -> float:
    """Of a level's residual, in half precision, against float64."""
    adapter, exact = released(torch.float16, SMALL), released(torch.float64, SMALL)
    feature = base_feature(level, (2, 3, 2), SMALL).half()
    path = CudaMapping(adapter, lambda dtype: operations, device=OnTheCpu())
    residual = path.residual(level, path.hidden(level, feature, NO_TIME))
    return relative_error(residual, exact.map_level(level, feature.double()))


def quantize_by_torch(x: torch.Tensor) -> EightBits:
    """As `quantize`."""
    scale = x.flatten(1).abs().amax(1).float() / 448
    return EightBits((x.float() / scale[:, None, None, None]).to(torch.float8_e4m3fn), scale)


def original(numbers: EightBits) -> torch.Tensor:
    """What the 8 bits stand for."""
    return numbers.values.double() * numbers.scale.double()[:, None, None, None]


def exactly(x, weight, bias, relu, residual) -> torch.Tensor:
    """The convolution in double precision."""
    convolution = Convolution(weight.double(), bias.double())
    return TorchOperations().convolve(x.double(), convolution, relu, None if residual is None else residual.double())


def channels_last(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Seeded numbers in half precision."""
    return seeded(name, shape).half().contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
