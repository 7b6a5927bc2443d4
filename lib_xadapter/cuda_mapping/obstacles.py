"""Whether mapping layers can run by CUDA kernels of their own here, and if not, why."""

from __future__ import annotations

import torch

from ..mapping import BlockLayout, MappingLayers
from .finish import CHANNELS_PER_THREAD

NVIDIA = "cuda"
"""How torch calls the devices that this is about."""

OLDEST = (7, 0)
"""The first compute capability with tensor cores."""

OLDEST_WITH_BFLOAT16 = (8, 0)


def obstacle(adapter: MappingLayers) -> str | None:
    """Why these mapping layers cannot run by `CudaMapping`, as a clause; None where they can."""
    return _no_device(adapter) or _wrong_layers(adapter)


def _no_device(adapter: MappingLayers) -> str | None:
    weight = adapter.zero_out[0].weight
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if weight.device.type != NVIDIA:
        return f"they are on {weight.device}"
    if not torch.backends.cudnn.is_available() or not torch.backends.cudnn.enabled:
        return "torch has no cuDNN"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"they are in {_name(weight.dtype)}, not in float16 or bfloat16"
    capability = torch.cuda.get_device_capability(weight.device)
    oldest = OLDEST_WITH_BFLOAT16 if weight.dtype == torch.bfloat16 else OLDEST
    if capability < oldest:
        return f"{_name(weight.dtype)} needs compute capability {_version(oldest)}, not {_version(capability)}"
    return None


def _wrong_layers(adapter: MappingLayers) -> str | None:
    for block in (block for level in adapter.levels for block in level):
        if (extra := _extra(block)) is not None:
            return f"these have {extra}, which the released ones have not"
        if block.in_channels % CHANNELS_PER_THREAD or block.out_channels % CHANNELS_PER_THREAD:
            return f"{block.in_channels} and {block.out_channels} channels are not multiples of {CHANNELS_PER_THREAD}"
    return None


def _extra(block: BlockLayout) -> str | None:
    if block.has_norm:
        return "group norms"
    if block.time_channels is not None:
        return "timestep conditioning"
    return "skip convolutions" if block.has_skip_convolution else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
