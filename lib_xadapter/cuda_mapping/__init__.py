"""The mapping layers on NVIDIA GPUs."""

from .obstacles import obstacle
from .path import CudaMapping

__all__ = ["CudaMapping", "obstacle"]
