"""A control map, and how far apart pictures are.

Two ways to the same picture may differ by a grey level: sums on a CPU are rounded by the number of threads and by where
tensors lie in memory.
"""

from __future__ import annotations

import numpy
from PIL import Image, ImageDraw


def grey_levels_apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of any channel of any pixel, 0..255; raises `AssertionError` on different sizes."""
    return int(_differences(one, other).max())


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    """Of all channels of all pixels, 0..255: tells which of two pictures a third one is nearer to."""
    return float(_differences(one, other).mean())


def _differences(one: Image.Image, other: Image.Image) -> numpy.ndarray:
    assert (one.size, one.mode) == (other.size, other.mode)
    return numpy.abs(numpy.asarray(one, dtype=numpy.int16) - numpy.asarray(other, dtype=numpy.int16))


def control_map(size: int) -> Image.Image:
    """White outlines on black, as an edge detector gives."""
    image = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)
    line = max(size // 32, 1)
    draw.ellipse((size // 8, size // 8, size * 7 // 8, size * 7 // 8), outline="white", width=line)
    draw.polygon([(size // 2, size // 4), (size * 3 // 4, size * 3 // 4), (size // 4, size * 3 // 4)], outline="white")
    return image
