"""The units of sd-webui-controlnet's panel: what is set in them, and which model each is for.

This file, `base_units` and `hooked_units` are the only ones that know the extension (1.1.455); where it is not
installed, no unit is ever found. `internal_controlnet.external_code` is what it offers to other extensions.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from ...controlnet_files import ControlFamily, detect_control_family
from ...errors import WrongArgument
from ..known_files import found_in_file

FAMILY_OF_VERSION: dict[str, ControlFamily] = {"SD1x": "sd1", "SD2x": "sd2", "SDXL": "sdxl"}
"""The extension's names for model versions."""

SDXL_PREPROCESSOR = "revision"
"""The extension's preprocessors without a model that act on SDXL alone have this in their names."""


def extension() -> ModuleType | None:
    """The extension's functions for other extensions, or None where it is not installed or switched off."""
    return sys.modules.get("internal_controlnet.external_code")


@dataclass(frozen=True, eq=False)
class Unit:
    """A unit of the ControlNet panel.

    Attributes:
        number: its tab's, from 0.
        settings: the extension's own object.
    """

    number: int
    settings: Any

    def __str__(self) -> str:
        return f"ControlNet unit {self.number} ({self.name})"

    @property
    def name(self) -> str:
        """Its model's, or its preprocessor's where it has none."""
        return self.settings.module if self.lacks_model or self._needs_no_model else self.settings.model

    @property
    def lacks_model(self) -> bool:
        """Whether no model is selected in it."""
        return (self.settings.model or "None").lower() == "none"

    @cached_property
    def family(self) -> ControlFamily | None:
        """The model it is for; None for one that works on SD1.5 and SD2 alike.

        Raises:
            WrongArgument: no model is selected, or one that is in no folder.
            WrongFile: the model's file cannot be read.
        """
        if self._needs_no_model:
            return "sdxl" if SDXL_PREPROCESSOR in self.settings.module.lower() else None
        if self.lacks_model:
            raise WrongArgument(f"{self} is enabled and has no model.")
        path = self.model_file()
        family = family_of_file(path)
        return family if family != "unknown" else family_by_name(path.name)

    def check_input(self, is_img2img: bool) -> None:
        """Whether it has something to work on; of much of this the extension only writes into its log.

        Args:
            is_img2img: there is a picture to paint over, which the extension gives to units without one.

        Raises:
            WrongArgument: it has not, or reads a folder of images.
        """
        if self.settings.input_mode.name == "BATCH":
            raise WrongArgument(f"{self} reads a batch of images, which does not work together with X-Adapter.")
        try:
            images = self.settings.ipadapter_input or self.settings.get_input_images_rgba()
        except Exception as error:
            raise WrongArgument(f"{self} has an image that cannot be read: {one_line(error)}") from error
        if images is None and not is_img2img:
            raise WrongArgument(f"{self} is enabled and has no image.")
        if self._is_merged and not isinstance(self.settings.image, list):
            raise WrongArgument(f"{self} merges a list of images, and has none.")

    @property
    def _is_merged(self) -> bool:
        """Whether the extension takes its images for a unit each."""
        return self.settings.input_mode.name == "MERGE" and not self.settings.accepts_multiple_inputs

    @property
    def _needs_no_model(self) -> bool:
        preprocessors = sys.modules["scripts.supported_preprocessor"].Preprocessor
        return preprocessors.get_preprocessor(self.settings.module).do_not_need_model

    def picture(self) -> Image.Image | None:
        """The first image that the user gave it, as it came; None where there is none."""
        images = self.settings.get_input_images_rgba()
        return Image.fromarray(images[0][..., :3]) if images else None

    @property
    def resize_mode(self) -> int:
        """How it fits its image to a size, as the WebUI's img2img tab numbers it."""
        return self.settings.resize_mode.int_value()

    def model_file(self) -> Path:
        """The model's file, as the extension finds it: by its full name, by the file's, or by a part of that.

        Raises:
            WrongArgument: there is none.
        """
        known = sys.modules["scripts.global_state"]
        wanted = self.settings.model
        found = known.cn_models.get(wanted) or known.cn_models.get(known.cn_models_names.get(wanted.lower()))
        if found is None:
            similar = sorted((name for name in known.cn_models_names if wanted.lower() in name), key=len)
            found = known.cn_models[known.cn_models_names[similar[0]]] if similar else None
        if found is None or not os.path.isfile(found):
            raise WrongArgument(f"{self} is enabled and there is no such model in the ControlNet folders.")
        return Path(found)


def read_unit(number: int, given: Any) -> Unit:
    """The unit of a tab or of a request.

    Args:
        number: from 0.
        given: the extension's own object, or what it takes over REST.

    Raises:
        WrongArgument: there is no extension, or it does not take the unit.
    """
    external = extension()
    if external is None:
        raise WrongArgument(f"ControlNet unit {number} needs the ControlNet extension, which is not there.")
    try:
        return Unit(number, external.to_processing_unit(given))
    except Exception as error:
        raise WrongArgument(f"ControlNet unit {number} cannot be read: {one_line(error)}") from error


def family_of_file(path: Path) -> ControlFamily:
    """The model that a file was made for, "unknown" where it does not tell; looked up once for each file.

    Raises:
        WrongFile: it cannot be read.
    """
    return found_in_file("xadapter-control-families", str(path), str(path), lambda: detect_control_family(path))


def family_by_name(file_name: str) -> ControlFamily:
    """What the extension reads from a file's name; SDXL, which is the current model, where that tells nothing."""
    version = sys.modules["scripts.enums"].StableDiffusionVersion.detect_from_model_name(file_name)
    return FAMILY_OF_VERSION.get(version.name, "sdxl")


def one_line(error: Exception) -> str:
    """An exception's message without line breaks; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
