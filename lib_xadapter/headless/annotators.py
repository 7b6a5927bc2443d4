"""Maps of pictures for ControlNets, by the annotators of controlnet_aux."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from typing import Any

from PIL import Image

from ..errors import WrongFile
from .annotator_names import ANNOTATORS, Annotator
from .job import Job

SMALLEST = 64
"""Sides that annotators work at, and what those are multiples of."""


def annotated(job: Job) -> Job:
    """A job with the maps of its control images, made at the base's size.

    Raises:
        WrongFile: an annotator's weights cannot be read.
    """
    if not any(job.annotators):
        return job
    pairs = zip(job.control_images, job.annotators, strict=True)
    return replace(job, control_maps=tuple(_map_of(image, made_by, job.base_size) for image, made_by in pairs))


def _map_of(image: Image.Image, annotator: Annotator | None, size: tuple[int, int]) -> Image.Image:
    if annotator is None:
        return image
    detect = _detector(annotator)
    side = max(SMALLEST, min(size))
    known = inspect.signature(detect.__call__).parameters
    sides = {name: side for name in ("detect_resolution", "image_resolution") if name in known}
    return detect(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), **sides).convert("RGB")


def _detector(annotator: Annotator) -> Any:
    kind = getattr(importlib.import_module("controlnet_aux"), ANNOTATORS[annotator.name].kind)
    if annotator.folder is None:
        return kind()
    try:
        return kind.from_pretrained(str(annotator.folder))
    except Exception as error:  # a pickle can fail in any way
        raise WrongFile(
            f"--annotate: the weights of '{annotator.name}' in {annotator.folder} cannot be read."
        ) from error
