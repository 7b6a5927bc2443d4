"""What fits on a GPU."""

from __future__ import annotations

from collections.abc import Iterable

import psutil
import torch
from torch import nn

WORKING_MEMORY = 2 * 2**30
"""Bytes for what UNets make in passing, at 1024 px with CFG."""


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
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_ram() -> int:
    """Bytes of ordinary memory that programs could still be given."""
    return psutil.virtual_memory().available


def fits_together(modules: Iterable[nn.Module | None], device: torch.device | str) -> bool:
    """Whether modules can be on a device at once and work there; anywhere but on an NVIDIA GPU they can."""
    device = torch.device(device)
    if device.type != "cuda":
        return True
    missing = sum(missing_from(module, device) for module in modules if module is not None)
    return missing + WORKING_MEMORY <= free_memory(device)
