"""The mapping layers on NVIDIA GPUs."""

from .obstacles import obstacle
from .path import ChannelsLastMapping, CudaMapping

__all__ = ["ChannelsLastMapping", "CudaMapping", "obstacle"]
