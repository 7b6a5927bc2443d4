"""The second checkpoint, and the context in which it is the WebUI's current model.

The WebUI has one current model. Everything that says which one it is (the model itself, the hijack's text encoder and
embeddings, the VAE's file, LoRAs in force, number types) is exchanged for the base's while the base runs, and put back.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from modules import devices, lowvram, sd_hijack, sd_models, sd_vae, shared
from modules.textual_inversion.textual_inversion import EmbeddingDatabase

from ..errors import XAdapterError

logger = logging.getLogger(__name__)

HIJACK_FIELDS = (
    "clip",
    "layers",
    "circular_enabled",
    "optimization_method",
    "embedding_db",
    "fixes",
    "comments",
    "extra_generation_params",
)
VAE_FIELDS = ("base_vae", "loaded_vae_file", "checkpoint_info")
DEVICE_FIELDS = ("fp8", "dtype_unet", "unet_needs_upcast")
OPTION_FIELDS = ("sd_model_checkpoint", "sd_checkpoint_hash")


def lora_extension() -> ModuleType | None:
    """The built-in Lora extension's `networks`, or None where the user switched it off."""
    return sys.modules.get("networks")


@dataclass
class Surroundings:
    """Everything in the WebUI that says which model is the current one."""

    model: torch.nn.Module | None
    loaded_models: list[torch.nn.Module]
    hijack: dict[str, Any]
    vae: dict[str, Any]
    number_types: dict[str, Any]
    options: dict[str, Any]
    parallel_processing_allowed: bool
    hypernetworks: list[Any]
    networks: list[Any]
    networks_in_memory: dict[str, Any]
    network_errors: dict[str, int]

    @classmethod
    def now(cls) -> Surroundings:
        """As they are."""
        loras = lora_extension()
        return cls(
            model=sd_models.model_data.sd_model,
            loaded_models=list(sd_models.model_data.loaded_sd_models),
            hijack={name: getattr(sd_hijack.model_hijack, name) for name in HIJACK_FIELDS},
            vae={name: getattr(sd_vae, name) for name in VAE_FIELDS},
            number_types={name: getattr(devices, name) for name in DEVICE_FIELDS},
            options={name: shared.opts.data.get(name) for name in OPTION_FIELDS},
            parallel_processing_allowed=shared.parallel_processing_allowed,
            hypernetworks=list(shared.loaded_hypernetworks),
            networks=list(loras.loaded_networks) if loras else [],
            networks_in_memory=dict(loras.networks_in_memory) if loras else {},
            network_errors=dict(loras.extra_network_lora.errors) if loras else {},
        )

    def install(self) -> None:
        """Make the WebUI see these again."""
        sd_models.model_data.sd_model = self.model
        sd_models.model_data.loaded_sd_models[:] = self.loaded_models
        for owner, fields in ((sd_hijack.model_hijack, self.hijack), (sd_vae, self.vae), (devices, self.number_types)):
            for name, value in fields.items():
                setattr(owner, name, value)
        shared.opts.data.update(self.options)
        shared.parallel_processing_allowed = self.parallel_processing_allowed
        shared.loaded_hypernetworks[:] = self.hypernetworks
        if loras := lora_extension():
            loras.loaded_networks[:] = self.networks
            for theirs, ours in (
                (loras.networks_in_memory, self.networks_in_memory),
                (loras.extra_network_lora.errors, self.network_errors),
            ):
                theirs.clear()
                theirs.update(ours)


class BaseModel:
    """A loaded SD1.5 checkpoint beside the WebUI's own model."""

    def __init__(self, info: sd_models.CheckpointInfo, surroundings: Surroundings) -> None:
        self.info = info
        self.control_models: dict[str, Any] = OrderedDict()
        """What the ControlNet extension has loaded for it, as that keeps it."""
        self._surroundings = surroundings

    @property
    def model(self) -> torch.nn.Module:
        """The host's model object, a `LatentDiffusion`."""
        return self._surroundings.model

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
        outside, preview = Surroundings.now(), shared.state.current_latent
        # the live preview is decoded in another thread, with whichever model is current
        shared.state.current_latent = None
        self._surroundings.install()
        try:
            with self.model.ema_scope():
                yield self.model
        finally:
            self._surroundings = Surroundings.now()
            outside.install()
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
    outside = Surroundings.now()
    logger.info("Loading the base model %s", info.title)
    try:
        _make_room()
        with sd_models.SkipWritingToConfig(), devices.without_autocast():
            model = sd_models.load_model(info)
        return BaseModel(info, replace(Surroundings.now(), loaded_models=[model]))
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise XAdapterError(f"The SD1.5 checkpoint {info.name} cannot be loaded: {error}") from error
    finally:
        outside.install()


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
