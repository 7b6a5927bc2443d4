"""Whether the mapping layers can run in 8 bits here, and the operations that do so."""

from __future__ import annotations

import importlib.metadata

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
    version = triton_version()
    if version is None:
        return "8 bits need Triton, which is not installed"
    if int(version.partition(".")[0]) < OLDEST_TRITON:
        return f"8 bits need Triton {OLDEST_TRITON}, not {version}"
    return None


def triton_version() -> str | None:
    """Of the Triton that is installed, None where there is none; without importing it."""
    names = importlib.metadata.packages_distributions().get("triton", ())
    return importlib.metadata.version(names[0]) if names else None


def eight_bit_operations(dtype: torch.dtype) -> Operations:
    """For `CudaMapping`."""
    from .triton_operations import EightBitOperations

    return EightBitOperations(CudaOperations(dtype))
