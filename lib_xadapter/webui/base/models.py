"""The base and the adapter, loaded once and kept as the user wants."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from modules import devices, lowvram, sd_models, shared

from ...mapping import load_adapter
from ...mapping_choice import MappingChoice, choose_mapping_path
from ...mapping_paths import MappingPath
from ...memory import ONE_PICTURE, Work, decoding_memory, free_memory, missing_from
from ...overlap import SideStream
from ...recording import LeastRecentlyUsed
from ...settings import AUTO, RECORDED
from ...two_stage import BaseCache
from .. import options
from .base_model import BaseModel, file_state, load_base_model

ATTRIBUTE = "xadapter_models"
"""Where the WebUI's own record of loaded models keeps ours."""

LARGEST_BASE = 1_300_000_000
"""Parameters of SD2.1 with its text encoder and VAE; SD1.5 has 1.07 billion."""

CONTROLNET = 361_300_000
"""Parameters of a ControlNet for SD1.5."""


@dataclass(frozen=True)
class MappingOnDisk:
    """What tells whether loaded mapping layers are still the file's, and run as they should."""

    path: Path
    modified: float
    choice: MappingChoice


class Models:
    """The base and the mapping layers that are loaded, for both tabs: see `loaded_models`."""

    def __init__(self) -> None:
        self.recordings: BaseCache = LeastRecentlyUsed(options.recordings_capacity)
        """Of the base in earlier jobs."""
        self._base: BaseModel | None = None
        self._mapping: tuple[MappingOnDisk, MappingPath] | None = None

    def base(self, info: sd_models.CheckpointInfo, sequential: bool) -> BaseModel:
        """The base model of a checkpoint, on the GPU; in RAM if it runs before SDXL and not beside it."""
        if not self._is_loaded(info):
            self._base = None
            devices.torch_gc()
            with upgraded_in_ram() if sequential else nullcontext():
                self._base = load_base_model(info)
                if sequential:
                    self._base.to_ram()
        if sequential:
            self._base.to_ram()
        else:
            self._base.to_gpu()
        return self._base

    def forget_base(self) -> None:
        """The next job loads its base from the file."""
        self._base = None

    def mapping(self, path: Path) -> MappingPath:
        """The mapping layers of a file, on the GPU, in the UNets' number type, run as the user wants."""
        wanted = MappingOnDisk(path, os.path.getmtime(path), options.mapping_choice())
        if self._mapping is None or self._mapping[0] != wanted:
            self._mapping = None
            adapter = load_adapter(path, devices.device, devices.dtype_unet)
            self._mapping = (wanted, choose_mapping_path(adapter, wanted.choice))
        self._mapping[1].adapter.to(devices.device, devices.dtype_unet)
        return self._mapping[1]

    def is_sequential(
        self, memory: str, info: sd_models.CheckpointInfo, adapter: Path | None, work: Work = ONE_PICTURE
    ) -> bool:
        """Whether base and SDXL are on the GPU one after the other.

        Args:
            memory: as in `Settings`; "auto" looks at what is free.
            info: the base's checkpoint.
            adapter: the adapter's file, where there is one.
            work: of a joint step.
        """
        if memory != AUTO:
            return memory == RECORDED
        if lowvram.is_enabled(shared.sd_model):
            return True
        if devices.device.type != "cuda":
            return False
        loaded = self._base.model if self._is_loaded(info) else None
        missing = _size_of_file(info) if loaded is None else missing_from(loaded, devices.device)
        if adapter is not None:
            missing += self._missing_of_mapping(adapter)
        missing += work.controlnets * CONTROLNET * _bytes_per_parameter()
        return missing + work.memory(overlapped=False) > free_memory(devices.device)

    def overlap(self, work: Work) -> SideStream | None:
        """Where the base runs beside SDXL, both on the GPU; None without a GPU, or where memory is tight."""
        if self.side_stream is None or work.memory(overlapped=True) > free_memory(devices.device):
            return None
        return self.side_stream

    def rest(self) -> None:
        """What happens after a job: stay, move to RAM, or go."""
        if options.keeping() == options.UNLOAD:
            self._base = self._mapping = None
        elif options.keeping() == options.KEEP_IN_RAM:
            if self._base is not None:
                self._base.to_ram()
            if self._mapping is not None:
                self._mapping[1].adapter.to(devices.cpu)
        devices.torch_gc()

    @functools.cached_property
    def side_stream(self) -> SideStream | None:
        """Where the base runs beside SDXL; one for all pictures, as torch keeps memory for each stream."""
        return SideStream(devices.device) if devices.device.type == "cuda" else None

    def _missing_of_mapping(self, path: Path) -> int:
        """Bytes of an adapter that are not on the GPU yet."""
        if self._mapping is not None and self._mapping[0].path == path:
            return missing_from(self._mapping[1].adapter, devices.device)
        return os.path.getsize(path)

    def _is_loaded(self, info: sd_models.CheckpointInfo) -> bool:
        return self._base is not None and self._base.file == file_state(info.filename)


def loaded_models() -> Models:
    """The one object of its kind, kept where the WebUI keeps its own models: "Reload UI" makes the scripts anew."""
    if not hasattr(sd_models.model_data, ATTRIBUTE):
        setattr(sd_models.model_data, ATTRIBUTE, Models())
    return getattr(sd_models.model_data, ATTRIBUTE)


def make_room_to_decode(base: BaseModel, pixels: int) -> None:
    """The base leaves a GPU on which SDXL's pictures, of so many pixels, could not be decoded beside it."""
    if devices.device.type == "cuda" and free_memory(devices.device) < decoding_memory(pixels):
        base.to_ram()


def base_to_device(base: BaseModel) -> None:
    """SDXL leaves the GPU to the base."""
    sd_models.send_model_to_cpu(shared.sd_model)
    base.to_gpu()


def upgraded_to_device(base: BaseModel) -> None:
    """The base leaves the GPU to SDXL."""
    base.to_ram()
    sd_models.send_model_to_device(shared.sd_model)


@contextmanager
def upgraded_in_ram() -> Iterator[None]:
    """While open, SDXL is not on the GPU."""
    sd_models.send_model_to_cpu(shared.sd_model)
    try:
        yield
    finally:
        sd_models.send_model_to_device(shared.sd_model)


def _size_of_file(info: sd_models.CheckpointInfo) -> int:
    """Bytes that a checkpoint will take; files can hold more than the model (EMA weights, optimizer states)."""
    return min(os.path.getsize(info.filename), LARGEST_BASE * _bytes_per_parameter())


def _bytes_per_parameter() -> int:
    return torch.finfo(devices.dtype_unet).bits // 8
