"""Convolutions as Triton kernels: a matrix product whose left factor is gathered from the feature while it runs.

Everything that follows is done before the sums leave the registers: scales, bias, residual, ReLU. 16 bits, or 8 bits
with a scale for each row of the batch and each output channel. Needs Triton, so Linux.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .weights import Convolution

LARGEST_EIGHT_BIT = 448.0
"""The largest number of float8_e4m3fn."""


@dataclass(frozen=True)
class Tiles:
    """How the product is cut: what one program computes, (pixels, channels) from `depth` input channels at a time.

    Args:
        pixels, channels, depth: powers of two, at least 16.
        warps: that share a program.
        stages: of `depth` that are loaded ahead.
    """

    pixels: int
    channels: int
    depth: int
    warps: int
    stages: int

    def launch_options(self) -> dict[str, int]:
        """As the kernel takes them."""
        return self.meta_parameters() | {"num_warps": self.warps, "num_stages": self.stages}

    def meta_parameters(self) -> dict[str, int]:
        """The kernel's constants."""
        return {"PIXELS": self.pixels, "CHANNELS": self.channels, "DEPTH": self.depth}


SIXTEEN_BIT_TILES = (
    Tiles(128, 256, 64, 8, 3),
    Tiles(128, 128, 64, 8, 4),
    Tiles(128, 128, 64, 4, 3),
    Tiles(64, 256, 64, 4, 3),
    Tiles(128, 128, 32, 4, 4),
    Tiles(64, 64, 32, 4, 4),
)
EIGHT_BIT_TILES = (
    Tiles(128, 256, 128, 8, 3),
    Tiles(128, 128, 128, 8, 4),
    Tiles(128, 128, 128, 4, 3),
    Tiles(64, 256, 128, 4, 3),
    Tiles(128, 128, 64, 4, 4),
    Tiles(64, 64, 64, 4, 4),
)

PROGRAM_GROUP = 8
"""Rows of tiles that programs walk through together, so that they share weights and pixels in the cache."""

NUMBERS_PER_PROGRAM = 4096


@triton.jit
def convolution_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    x_scale,
    weight_scale,
    pixels,
    height,
    width,
    in_channels,
    out_channels,
    KERNEL: tl.constexpr,
    RELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of out = ReLU(x_scale · weight_scale · (W * x) + b + residual).

    x (rows, h, w, in), W (out, k, k, in), residual and out (rows, h, w, out), `pixels` = rows · h · w.
    """
    tiles_down = tl.cdiv(pixels, PIXELS)
    tiles_across = tl.cdiv(out_channels, CHANNELS)
    program = tl.program_id(0)
    first_down = program // (GROUP * tiles_across) * GROUP
    group = tl.minimum(tiles_down - first_down, GROUP)
    within = program % (GROUP * tiles_across)
    pixel = (first_down + within % group) * PIXELS + tl.arange(0, PIXELS)
    channel = within // group * CHANNELS + tl.arange(0, CHANNELS)
    depth = tl.arange(0, DEPTH)

    column = pixel % width
    line = pixel // width % height
    sums = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    steps = tl.cdiv(in_channels, DEPTH)
    for step in range(0, KERNEL * KERNEL * steps):
        tap = step // steps
        in_channel = step % steps * DEPTH + depth
        down = tap // KERNEL - KERNEL // 2
        across = tap % KERNEL - KERNEL // 2
        inside = (line + down >= 0) & (line + down < height) & (column + across >= 0) & (column + across < width)
        neighbour = pixel + down * width + across
        gathered = tl.load(
            x + neighbour[:, None] * in_channels + in_channel[None, :],
            mask=(inside & (pixel < pixels))[:, None] & (in_channel < in_channels)[None, :],
            other=0.0,
        )
        weights = tl.load(
            weight + (channel[None, :] * (KERNEL * KERNEL) + tap) * in_channels + in_channel[:, None],
            mask=(channel < out_channels)[None, :] & (in_channel < in_channels)[:, None],
            other=0.0,
        )
        sums = tl.dot(gathered, weights, sums)

    if SCALED:
        row = pixel // (width * height)
        sums *= tl.load(x_scale + row, mask=pixel < pixels, other=0.0)[:, None]
        sums *= tl.load(weight_scale + channel, mask=channel < out_channels, other=0.0)[None, :]
    sums += tl.load(bias + channel, mask=channel < out_channels, other=0.0).to(tl.float32)[None, :]
    place = pixel[:, None] * out_channels + channel[None, :]
    valid = (pixel < pixels)[:, None] & (channel < out_channels)[None, :]
    if HAS_RESIDUAL:
        sums += tl.load(residual + place, mask=valid, other=0.0).to(tl.float32)
    if RELU:
        sums = tl.where(sums < 0.0, 0.0, sums)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=valid)


@triton.jit
def quantize_kernel(x, scale, out, numbers, LARGEST: tl.constexpr, NUMBERS: tl.constexpr):
    """out = x / scale in 8 bits, (rows, numbers), a scale for each row."""
    row = tl.program_id(1)
    place = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    value = tl.load(x + row * numbers + place, mask=place < numbers, other=0.0).to(tl.float32)
    value = value / tl.load(scale + row)
    # the division may round beyond the largest number, which has no infinity behind it
    value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
    tl.store(out + row * numbers + place, value.to(out.dtype.element_ty), mask=place < numbers)


@dataclass(frozen=True)
class EightBits:
    """Numbers in float8_e4m3fn, and what each row of them is to be multiplied by, (rows,) in float32."""

    values: Tensor
    scale: Tensor


def quantize(x: Tensor) -> EightBits:
    """A feature or weight of four dimensions, which becomes channels-last; each of its rows uses the whole range."""
    x = x.contiguous(memory_format=torch.channels_last)
    rows = len(x)
    numbers = x.numel() // rows
    flat = x.permute(0, 2, 3, 1).reshape(rows, numbers)
    scale = torch.linalg.vector_norm(flat, float("inf"), dim=1).float() / LARGEST_EIGHT_BIT
    # a row of zeros has no range
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.channels_last)
    grid = (triton.cdiv(numbers, NUMBERS_PER_PROGRAM), rows)
    quantize_kernel[grid](flat, scale, values, numbers, LARGEST=LARGEST_EIGHT_BIT, NUMBERS=NUMBERS_PER_PROGRAM)
    return EightBits(values, scale)


class TritonConvolution:
    """Convolutions of stride one that keep the size, with all that follows them.

    Args:
        tiles: to try once per shape on the GPU, of which the fastest is taken; a single one is taken as it is.
    """

    def __init__(self, tiles: tuple[Tiles, ...]) -> None:
        self._only = tiles[0] if len(tiles) == 1 else None
        self._kernel = convolution_kernel if self._only else _fastest(tiles)

    def __call__(
        self,
        x: Tensor,
        convolution: Convolution,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """ReLU(W * x + b + residual), in the type of x; arguments as for `Operations.convolve`."""
        return self._run(x, convolution.weight, convolution.bias, relu, residual, None, None)

    def in_eight_bits(
        self, x: EightBits, weight: EightBits, bias: Tensor, relu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """The same from quantised factors, in the type of the bias."""
        return self._run(x.values, weight.values, bias, relu, residual, x.scale, weight.scale)

    def _run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        relu: bool,
        residual: Tensor | None,
        x_scale: Tensor | None,
        weight_scale: Tensor | None,
    ) -> Tensor:
        rows, in_channels, height, width = x.shape
        out_channels, kernel = len(weight), weight.shape[-1]
        out = torch.empty(
            (rows, out_channels, height, width), dtype=bias.dtype, device=x.device, memory_format=torch.channels_last
        )
        pixels = rows * height * width

        def grid(tiles: dict[str, int]) -> tuple[int]:
            return (triton.cdiv(pixels, tiles["PIXELS"]) * triton.cdiv(out_channels, tiles["CHANNELS"]),)

        self._kernel[grid](
            x,
            weight,
            bias,
            out if residual is None else residual,
            out,
            bias if x_scale is None else x_scale,
            bias if weight_scale is None else weight_scale,
            pixels,
            height,
            width,
            in_channels,
            out_channels,
            KERNEL=kernel,
            RELU=relu,
            HAS_RESIDUAL=residual is not None,
            SCALED=x_scale is not None,
            GROUP=PROGRAM_GROUP,
            **(self._only.launch_options() if self._only else {}),
        )
        return out


def _fastest(tiles: tuple[Tiles, ...]) -> object:
    configurations = [
        triton.Config(choice.meta_parameters(), num_warps=choice.warps, num_stages=choice.stages) for choice in tiles
    ]
    shape = ["pixels", "height", "width", "in_channels", "out_channels", "KERNEL", "RELU", "HAS_RESIDUAL", "SCALED"]
    return triton.autotune(configurations, key=shape)(convolution_kernel)
