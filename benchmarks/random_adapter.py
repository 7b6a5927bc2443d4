"""Mapping layers with random weights, at the released size or a tenth of it."""

from __future__ import annotations

import math

import torch
from torch import nn

from lib_xadapter.mapping import MappingLayers, read_layout
from tests.small_adapter import AdapterPlan

RELEASED = AdapterPlan(in_channels=(1280, 640, 320), out_channels=(1280, 1280, 640))
"""The released mapping layers (X_Adapter_v1.bin)."""


def random_adapter(dtype: torch.dtype, small: bool = False, device: str = "cpu") -> MappingLayers:
    """Mapping layers of the released shapes or at a tenth of their width; on "meta" without weights."""
    plan = AdapterPlan() if small else RELEASED
    with torch.device("meta"):
        adapter = MappingLayers(read_layout(plan.shapes()))
    return filled(adapter, dtype, device)


@torch.no_grad()
def filled(module: nn.Module, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """A module made on "meta", with weights that keep features at the size they have; without any on "meta"."""
    if device == "meta":
        return module.to(dtype).eval().requires_grad_(False)
    module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for tensor in module.parameters():
        if tensor.ndim > 1:
            reach = math.sqrt(3 / math.prod(tensor.shape[1:]))
            tensor.uniform_(-reach, reach, generator=generator)
        else:
            tensor.fill_(0)
    for layer in module.modules():
        if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
            layer.weight.fill_(1)
    return module


def picture_size(text: str) -> tuple[int, int]:
    """Width and height from "WIDTHxHEIGHT", for the command line."""
    width, height = text.split("x")
    return int(width), int(height)


def written_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def type_named(name: str) -> torch.dtype:
    """float32, float16 or bfloat16, for the command line."""
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
