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
from modules import shared
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
    token_merging: float,
) -> str:
    """A name for all that the base's side depends on.

    Args:
        base: the base model.
        job: its processing object.
        settings: of X-Adapter.
        networks: the base's LoRAs.
        units: the base's ControlNet units.
        levels: noise levels at which it is recorded.
        token_merging: the ratio of tokens that the WebUI merges.
    """
    options = {name: value for name, value in shared.opts.data.items() if name not in UPGRADED_OPTIONS}
    return fingerprint(
        {
            "checkpoint": file_state(base.info.filename),
            "job": {name: getattr(job, name) for name in (*JOB_FIELDS, *SHARED_FIELDS)},
            # drawn anew for each job, whether they are used or not
            "subseeds": job.subseeds if job.subseed_strength else [],
            "settings": {name: getattr(settings, name) for name in SIDE_SETTINGS},
            "loras": [lora_state(tag) for tag in plugins.lora_tags(networks)],
            "embeddings": [file_state(path) for path in embedding_files()],
            "units": units.state(),
            "options": options,
            "token merging": token_merging,
            "levels": levels,
        }
    )


def lora_state(tag: Any) -> list[Any]:
    """What a LoRA tag says, and its file."""
    on_disk = plugins.known_lora(plugins.name_of(tag))
    return [tag.items, file_state(on_disk.filename) if on_disk is not None else None]


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
