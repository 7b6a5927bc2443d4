"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import WrongFile, first_line


def write_whole(path: Path, write: Callable[[Path], object], durable: bool = False) -> Path:
    """Let `write` fill a file beside `path`, then put it in its place.

    Args:
        durable: whether it is whole or not there where the machine stops, too.

    Raises:
        WrongFile: it cannot be written there.
    """
    beside = path.with_name(f".{path.stem}.part{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(beside)
            if durable:
                _fsync(beside)
            os.replace(beside, path)
            if durable:
                _fsync(path.parent)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise WrongFile(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or first_line(error)}."
        ) from error
    return path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file, whole or not at all, also where the machine stops.

    Raises:
        WrongFile: it cannot be written there.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(beside: Path) -> None:
        beside.touch()
        mode = beside.stat().st_mode
        safetensors.torch.save_file(held, beside, dict(metadata))
        # safetensors lets nobody else read what it writes
        beside.chmod(mode)

    return write_whole(path, write, durable=True)


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        # Windows opens no folders, and writes only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
