"""LoRA files for tiny15 and tinyxl: the shapes of `lora_formats` filled with random numbers of a fitting size."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from .. import lora_formats
from ..lora_formats import Shape, Shapes
from .server import WebUIServer

TINY15 = lora_formats.NARROW_MODELS["sd1"]
TAKES_ITS_INPUT = ("ff_net_2.on_input", "mlp_fc2.on_input")


def add_lora(server: WebUIServer, name: str, shapes: Shapes, suffix: str = ".safetensors") -> Path:
    """Write a LoRA into the server's folder, where it is found when a prompt names it."""
    tensors = filled(shapes)
    path = server.data / "models/Lora" / (name + suffix)
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        # the WebUI takes no files with the entries that newer versions of torch add
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    return path


def filled(shapes: Shapes, seed: int = 5) -> dict[str, torch.Tensor]:
    """Numbers for tensors of a LoRA: changes about as large as the weights that they change."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _numbers(name, shape, generator) for name, shape in shapes.items()}


def _numbers(name: str, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    parameter = name.rsplit(".", 1)[-1]
    noise = torch.randn(shape, generator=generator)
    if parameter == "alpha":
        return torch.tensor(float(lora_formats.RANK))
    if parameter == "on_input":
        return torch.tensor(name.endswith(TAKES_ITS_INPUT))
    if parameter in ("dora_scale", "rescale"):
        return 1 + 0.2 * noise
    if parameter == "oft_diag":  # rotations themselves; the newer formats hold what they follow from
        return torch.eye(shape[-1]) + 0.2 * noise
    if len(shape) < 2:
        return 0.3 * noise
    return noise / math.sqrt(math.prod(shape[1:]))
