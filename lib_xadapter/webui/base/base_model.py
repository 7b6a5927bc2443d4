"""The second checkpoint, and the context in which it is the WebUI's current model.

What is exchanged for that stands in `host_state`.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from modules import devices, lowvram, sd_hijack, sd_models, shared
from modules.textual_inversion.textual_inversion import EmbeddingDatabase

from ...errors import XAdapterError
from .host_state import Exchange, HostState, current_model_places, lora_extension

logger = logging.getLogger(__name__)

HASH_OPTION = "sd_checkpoint_hash"

FileState = tuple[str, float, int]
"""A file's path, time of change in seconds, and size in bytes."""


def file_state(path: str) -> FileState:
    """What changes when a file does."""
    found = os.stat(path)
    return path, found.st_mtime, found.st_size


class BaseModel:
    """A loaded SD1.5 checkpoint beside the WebUI's own model."""

    def __init__(
        self, info: sd_models.CheckpointInfo, model: torch.nn.Module, file: FileState, state: HostState
    ) -> None:
        self.info = info
        self.file = file
        """Of the checkpoint when it was loaded; a file written over since is another one."""
        self.control_models: dict[str, Any] = OrderedDict()
        """What the ControlNet extension has loaded for it, as that keeps it."""
        self._model = model
        self._exchange = Exchange(state)

    @property
    def model(self) -> torch.nn.Module:
        """The host's model object, a `LatentDiffusion`."""
        return self._model

    @property
    def unet(self) -> torch.nn.Module:
        """Its UNet, in CompVis layout."""
        return self.model.model.diffusion_model

    @property
    def family(self) -> str:
        """sd1 or sd2."""
        return "sd2" if self.model.is_sd2 else "sd1"

    @contextmanager
    def current(self) -> Iterator[torch.nn.Module]:
        """While open, the base is the WebUI's current model, with its own LoRAs and embeddings in force."""
        # the live preview is decoded in another thread, with whichever model is current
        preview, shared.state.current_latent = shared.state.current_latent, None
        try:
            with self._exchange.in_force(), self.model.ema_scope():
                yield self.model
        finally:
            shared.state.current_latent = preview

    def to_gpu(self) -> None:
        """Bring it to where sampling runs, unless the WebUI moves its parts itself (--medvram, --lowvram)."""
        if not lowvram.is_enabled(self.model):
            self.model.to(devices.device)

    def to_ram(self) -> None:
        """Free its video memory."""
        with self.current():
            sd_models.send_model_to_cpu(self.model)
        for control in self.control_models.values():
            control.model.to(devices.cpu)


def load_base_model(info: sd_models.CheckpointInfo) -> BaseModel:
    """Load a checkpoint beside the current model, which stays the current one whatever happens.

    Raises:
        XAdapterError: the checkpoint cannot be read.
    """
    outside = HostState.capture(current_model_places())
    checkpoint_hash = shared.opts.data.get(HASH_OPTION)
    logger.info("Loading the base model %s", info.title)
    try:
        file = file_state(info.filename)
        _make_room()
        with sd_models.SkipWritingToConfig(), devices.without_autocast(), same_optimization():
            model = sd_models.load_model(info)
        sd_models.model_data.loaded_sd_models[:] = [model]
        return BaseModel(info, model, file, outside.again())
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise XAdapterError(f"The SD1.5 checkpoint {info.name} cannot be loaded: {error}") from error
    finally:
        outside.restore()
        # the loader writes it; another checkpoint that was chosen in the meantime has a hash of its own
        if shared.opts.data.get(HASH_OPTION) == info.sha256:
            shared.opts.data[HASH_OPTION] = checkpoint_hash


@contextmanager
def same_optimization() -> Iterator[None]:
    """While open, the WebUI loads models and VAEs and leaves the attention optimization as it is.

    It applies one to the classes of SD1.5 and of SDXL at once, with everything that it loads, so SDXL's loading has
    done that for both. Applied again it would be another one: the WebUI's first time leaves SDXL's VAE with the
    attention of SD1.5's, the second with its own, whose sums are rounded otherwise: plain pictures would change.
    """
    name = sd_hijack.model_hijack.optimization_method
    with (
        patch.object(sd_hijack, "apply_optimizations", lambda option=None: name),
        patch.object(sd_hijack, "undo_optimizations", lambda: None),
    ):
        yield


def _make_room() -> None:
    """Empty every place that the loader would otherwise clear of what belongs to the current model."""
    hijack = sd_hijack.model_hijack
    embeddings = EmbeddingDatabase()
    for path in hijack.embedding_db.embedding_dirs:
        embeddings.add_embedding_dir(path)
    hijack.embedding_db, hijack.circular_enabled = embeddings, False
    hijack.comments, hijack.extra_generation_params = [], {}
    # the loader sends the current model to the meta device if it finds one
    sd_models.model_data.sd_model = None
    shared.loaded_hypernetworks.clear()
    if loras := lora_extension():
        loras.loaded_networks.clear()
        loras.networks_in_memory.clear()
