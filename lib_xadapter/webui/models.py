"""The base and the adapter, loaded once and kept as the user wants."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from modules import devices, sd_models

from ..mapping import MappingLayers, load_adapter
from . import options
from .base_model import BaseModel, load_base_model


@dataclass(frozen=True)
class AdapterOnDisk:
    """What tells whether a loaded adapter is still the file's."""

    path: Path
    modified: float


class Models:
    """What is loaded now. One object lives as long as the script does."""

    def __init__(self) -> None:
        self._base: BaseModel | None = None
        self._adapter: tuple[AdapterOnDisk, MappingLayers] | None = None

    def base(self, info: sd_models.CheckpointInfo) -> BaseModel:
        """The base model of a checkpoint, on the GPU."""
        if self._base is None or self._base.info.filename != info.filename:
            self._base = None
            devices.torch_gc()
            self._base = load_base_model(info)
        self._base.to_gpu()
        return self._base

    def forget_base(self) -> None:
        """The next job loads its base from the file."""
        self._base = None

    def adapter(self, path: Path) -> MappingLayers:
        """The mapping layers of a file, on the GPU, in the UNets' number type."""
        on_disk = AdapterOnDisk(path, os.path.getmtime(path))
        if self._adapter is None or self._adapter[0] != on_disk:
            self._adapter = None
            self._adapter = (on_disk, load_adapter(path, dtype=devices.dtype_unet))
        return self._adapter[1].to(devices.device, devices.dtype_unet)

    def rest(self) -> None:
        """What happens after a job: stay, move to RAM, or go."""
        if options.keeping() == options.UNLOAD:
            self._base = self._adapter = None
        elif options.keeping() == options.KEEP_IN_RAM:
            if self._base is not None:
                self._base.to_ram()
            if self._adapter is not None:
                self._adapter[1].to(devices.cpu)
        devices.torch_gc()
