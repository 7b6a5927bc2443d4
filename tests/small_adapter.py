"""Small mapping layers in the released layout, with weights that anyone can make again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tests.seeded import seeded_weight


@dataclass(frozen=True)
class AdapterPlan:
    """What a small adapter is made of; the defaults are the released structure at a tenth of its width."""

    in_channels: tuple[int, int, int] = (128, 64, 32)
    out_channels: tuple[int, int, int] = (128, 128, 64)
    blocks: int = 3
    norm: bool = False
    time_channels: int | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in the file."""
        shapes: dict[str, tuple[int, ...]] = {}
        for level, (inner, outer) in enumerate(zip(self.in_channels, self.out_channels, strict=True)):
            for place in range(self.blocks):
                block = f"body.{level * self.blocks + place}"
                if place == 0 and level == 2:
                    shapes |= layer(f"{block}.up_opt.op", inner, inner, 3)
                if place == 0 and inner != outer:
                    shapes |= layer(f"{block}.in_conv", outer, inner, 3)
                shapes |= layer(f"{block}.block1", outer, outer, 3) | layer(f"{block}.block2", outer, outer, 3)
                if self.norm:
                    shapes |= {f"{block}.norm1.weight": (outer,), f"{block}.norm1.bias": (outer,)}
                if self.time_channels:
                    shapes[f"{block}.timestep_proj.linear.weight"] = (outer, self.time_channels)
                    shapes[f"{block}.timestep_proj.linear.bias"] = (outer,)
            shapes |= layer(f"zero_out.{level}", outer, outer, 1)
        return shapes

    def weights(self, prefix: str = "adapter.released.") -> dict[str, Tensor]:
        return {key: seeded_weight(prefix + key, shape) for key, shape in self.shapes().items()}


def layer(name: str, outer: int, inner: int, kernel: int) -> dict[str, tuple[int, ...]]:
    """Weight and bias of one convolution."""
    return {f"{name}.weight": (outer, inner, kernel, kernel), f"{name}.bias": (outer,)}


def save(weights: dict[str, Tensor], path: Path) -> Path:
    """Write weights as the ending of the path says."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path)
    return path
