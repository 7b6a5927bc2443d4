"""Everything that the base gives to a picture, and the name under which it is found again.

The base never depends on SDXL. As long as nothing that it does depend on has changed, what it made in an earlier job is
what it would make again.
"""

from __future__ import annotations

import enum
import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from modules import sd_vae, shared
from modules.processing import StableDiffusionProcessingTxt2Img
from PIL import Image

from ..recording import Recording
from ..settings import Settings
from . import plugins
from .base_model import BaseModel
from .base_units import BaseUnits
from .stage_one import SHARED_FIELDS, StageOne

UPGRADED_OPTIONS = ("sd_model_checkpoint", "sd_checkpoint_hash")
"""Settings of the WebUI that say nothing about the base."""
OWN_OPTIONS = "xadapter_"
BUILT_IN = "processing_scripts"
"""The folder of the scripts that the WebUI's own fields are, such as the seed."""
OWN_TITLES = ("X-Adapter", "ControlNet")
"""Scripts whose part in the base's side is known otherwise."""
JOB_FIELDS = ("prompts", "negative_prompts", "width", "height", "steps", "cfg_scale", "seeds")
SIDE_SETTINGS = ("base_start", "single_stage")


@dataclass(frozen=True)
class Encoding:
    """What is known once the base's prompts are encoded.

    Attributes:
        embeddings: names of the textual inversions that the base has vectors for.
        unusable: names of those that it has not.
        lora_hashes: for the infotext.
    """

    embeddings: Collection[str]
    unusable: Collection[str]
    lora_hashes: Mapping[str, str]


@dataclass(frozen=True)
class BaseSide:
    """What the base made for one batch.

    Attributes:
        encoding: of its prompts.
        stage_one: its picture.
        recording: its features in the joint stage.
        detected_maps: of its ControlNet units.
    """

    encoding: Encoding
    stage_one: StageOne
    recording: Recording
    detected_maps: Sequence[Image.Image]

    @property
    def size(self) -> int:
        """Bytes of memory, nearly all of them the recording's."""
        pictures = (*self.stage_one.pictures, *self.detected_maps)
        return self.recording.size + sum(len(image.getbands()) * image.width * image.height for image in pictures)


def key_of(
    base: BaseModel,
    job: StableDiffusionProcessingTxt2Img,
    settings: Settings,
    networks: plugins.NetworkData,
    units: BaseUnits,
    levels: Sequence[float],
    p: StableDiffusionProcessingTxt2Img,
) -> str:
    """A name for all that the base's side depends on.

    Args:
        base: the base model.
        job: its processing object.
        settings: of X-Adapter.
        networks: the base's LoRAs.
        units: the base's ControlNet units.
        levels: noise levels at which it is recorded.
        p: SDXL's processing object, for what other extensions were told.
    """
    options = {name: value for name, value in shared.opts.data.items() if concerns_base(name)}
    return fingerprint(
        {
            "checkpoint": file_state(base.info.filename),
            "job": {name: getattr(job, name) for name in (*JOB_FIELDS, *SHARED_FIELDS)},
            # drawn anew for each job, whether they are used or not
            "subseeds": job.subseeds if job.subseed_strength else [],
            "settings": {name: getattr(settings, name) for name in SIDE_SETTINGS},
            "vae": vae_state(base),
            "schedule": job.sampler_noise_scheduler_override,
            "networks": {kind: [tag.items for tag in tags] for kind, tags in networks.items()},
            "loras": [lora_state(tag) for tag in plugins.lora_tags(networks)],
            "embeddings": [file_state(path) for path in embedding_files()],
            "units": units.state(),
            "options": options,
            "token merging": p.get_token_merging_ratio(),
            "other extensions": told_to_others(p),
            "levels": levels,
        }
    )


def concerns_base(option: str) -> bool:
    """Whether a setting of the WebUI may change what the base makes."""
    return option not in UPGRADED_OPTIONS and not option.startswith(OWN_OPTIONS)


def vae_state(base: BaseModel) -> tuple[str, float, int] | None:
    """The VAE's file that the WebUI chooses for the base; None for the checkpoint's own."""
    path = sd_vae.resolve_vae(base.info.filename).vae
    return None if path is None else file_state(path)


def told_to_others(p: StableDiffusionProcessingTxt2Img) -> list[Any]:
    """The arguments of other extensions' scripts: some of them have a hand in the base's sampling, too."""
    scripts = p.scripts.alwayson_scripts if p.scripts is not None else []
    others = [script for script in scripts if BUILT_IN not in script.filename and script.title() not in OWN_TITLES]
    return [[script.title(), p.script_args[script.args_from : script.args_to]] for script in others]


def lora_state(tag: Any) -> tuple[str, float, int] | None:
    """A LoRA's file."""
    on_disk = plugins.known_lora(plugins.name_of(tag))
    return None if on_disk is None else file_state(on_disk.filename)


def embedding_files() -> Iterable[str]:
    """Textual inversions, all of them: which of them a prompt uses is known once it is encoded."""
    return sorted(shared.walk_files(shared.cmd_opts.embeddings_dir))


def file_state(path: str) -> tuple[str, float, int]:
    """What changes when a file does."""
    found = os.stat(path)
    return path, found.st_mtime, found.st_size


def fingerprint(value: Any) -> str:
    """A hash of what a value holds. What is of a kind not known here has no equal but itself."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()


def _parts(value: Any) -> Iterable[bytes]:
    yield type(value).__name__.encode()
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield str(name).encode()
            yield from _parts(value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, (Image.Image, torch.Tensor, numpy.ndarray)):
        array = value.cpu().numpy() if isinstance(value, torch.Tensor) else numpy.asarray(value)
        yield f"{array.shape} {array.dtype}".encode()
        yield array.tobytes()
    elif isinstance(value, enum.Enum):
        yield value.name.encode()
    else:
        yield repr(value).encode()
