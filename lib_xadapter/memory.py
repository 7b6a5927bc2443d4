"""What fits on a GPU, and what leaves it where something does not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch
from torch import nn

MEGAPIXEL = 2**20
GIBIBYTE = 2**30

# Activations and workspaces, in half precision, in GiB for a megapixel of the picture that the model makes. Estimated
# from the sizes of features and attention, and generously: not measured on a GPU.
UPGRADED_STEP = 0.75
"""SDXL's UNet, for each row of its batch."""
BASE_STEP = 1.5
"""SD1.5's UNet, for each row of its batch."""
CONTROLNET_STEP = 0.75
"""A ControlNet of SD1.5, for each row of its batch."""
MAPPING_STEP = 0.25
"""The mapping layers, and the features that wait for SDXL's decoder, for each row and megapixel of SDXL's picture."""
DECODING = 4.5
"""A VAE in float32, which decodes or encodes one picture."""
ALWAYS = 0.5
"""GiB for what convolutions and matrix products work in, and for gaps between tensors."""


@dataclass(frozen=True)
class Work:
    """What a joint step computes, for what it needs beside the models' weights.

    Attributes:
        rows: of a UNet's batch: images times CFG halves.
        pixels, base_pixels: of one picture of SDXL and of SD1.5.
        controlnets: that are at work on the base.
    """

    rows: int = 2
    pixels: int = 1024 * 1024
    base_pixels: int = 512 * 512
    controlnets: int = 0

    def memory(self, overlapped: bool) -> int:
        """Bytes: on a stream of its own the base uses a pool of its own, beside SDXL's, and otherwise the same one."""
        upgraded = UPGRADED_STEP * self.pixels
        base = (BASE_STEP + CONTROLNET_STEP * self.controlnets) * self.base_pixels
        models = upgraded + base if overlapped else max(upgraded, base)
        per_row = (models + MAPPING_STEP * self.pixels) / MEGAPIXEL
        return int((self.rows * per_row + ALWAYS) * GIBIBYTE)


ONE_PICTURE = Work()
"""At 1024 px, with CFG and no ControlNet."""


def decoding_memory(pixels: int) -> int:
    """Bytes that a VAE in float32 needs beside its weights, for a picture of so many pixels."""
    return int((DECODING * pixels / MEGAPIXEL + ALWAYS) * GIBIBYTE)


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def missing_from(module: nn.Module, device: torch.device) -> int:
    """Bytes of a module that are not on a device yet."""
    # torch calls the current GPU "cuda" where it is asked for, and "cuda:0" where a tensor is
    there = (lambda found: found.type == device.type) if device.index is None else (lambda found: found == device)
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()) if not there(tensor.device))


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that could be given out: what the driver has, and what torch keeps for later."""
    # torch before 2.5 takes no device without a number here
    number = torch.cuda.current_device() if device.index is None else device.index
    free, _ = torch.cuda.mem_get_info(number)
    return free + torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)


def free_ram() -> int:
    """Bytes of RAM that programs could still be given."""
    return psutil.virtual_memory().available


def fits_together(modules: Iterable[nn.Module | None], device: torch.device | str, working: int) -> bool:
    """Whether modules can be on a device at once and work there; anywhere but on an NVIDIA GPU they can.

    Args:
        working: bytes that they need beside their weights.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return True
    missing = sum(missing_from(module, device) for module in modules if module is not None)
    return missing + working <= free_memory(device)


def make_room(needed: int, device: torch.device | str, modules: Iterable[nn.Module]) -> None:
    """One module after the other leaves a GPU for RAM, until so many bytes are free there."""
    device = torch.device(device)
    for module in modules:
        if device.type != "cuda" or free_memory(device) >= needed:
            return
        module.to("cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory did not suffice, by torch's own error or one of the libraries' that it passes on."""
    words = str(error).lower().replace("_", " ")
    says_so = isinstance(error, RuntimeError) and ("out of memory" in words or "alloc failed" in words)
    return says_so or isinstance(error, torch.cuda.OutOfMemoryError)
