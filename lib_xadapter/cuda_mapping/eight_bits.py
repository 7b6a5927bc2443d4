"""Whether the mapping layers can run in 8 bits here, and the operations that do so."""

from __future__ import annotations

import importlib.util

import torch

from ..mapping import MappingLayers
from .cuda_operations import CudaOperations
from .operations import Operations

OLDEST_WITH_EIGHT_BITS = (8, 9)
"""The first compute capability whose tensor cores take float8."""

OLDEST_TRITON = 3
"""Major version; before it, float8 had another name and no conversion on every card."""


def eight_bit_obstacle(adapter: MappingLayers) -> str | None:
    """Why mapping layers that can run by `CudaMapping` cannot do so in 8 bits, as a clause; None where they can."""
    major, minor = torch.cuda.get_device_capability(adapter.zero_out[0].weight.device)
    if (major, minor) < OLDEST_WITH_EIGHT_BITS:
        return f"8 bits need compute capability 8.9, not {major}.{minor}"
    if importlib.util.find_spec("triton") is None:
        return "8 bits need Triton, which is not installed"
    import triton

    if int(triton.__version__.partition(".")[0]) < OLDEST_TRITON:
        return f"8 bits need Triton {OLDEST_TRITON}, not {triton.__version__}"
    return None


def eight_bit_operations(dtype: torch.dtype) -> Operations:
    """For `CudaMapping`."""
    from .triton_operations import EightBitOperations

    return EightBitOperations(CudaOperations(dtype))
