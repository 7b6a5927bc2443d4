"""What runs here beside X-Adapter: versions that it was not tried with, and extensions that are not there."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

from modules import launch_utils

from ..tried_versions import Version, difference
from .base.controlnet_units import extension
from .base.host_state import lora_extension

logger = logging.getLogger(__name__)

TRIED_WEBUI = "v1.10.1"
TRIED_CONTROLNET = "v1.1.455"


def running() -> Iterator[Version]:
    """The WebUI's, and the ControlNet extension's where it is there."""
    yield Version("the WebUI", TRIED_WEBUI, launch_utils.git_tag())
    if controlnet := sys.modules.get("scripts.controlnet_version"):
        yield Version("sd-webui-controlnet", TRIED_CONTROLNET, controlnet.version_flag)


def absent() -> Iterator[str]:
    """What cannot be had, as an extension is switched off or not installed."""
    if lora_extension() is None:
        yield "the Lora extension, which SD1.5 LoRAs need"
    if extension() is None:
        yield "sd-webui-controlnet, which SD1.5 ControlNets need"


def warn_of_others() -> None:
    """A line in the log for each of both; called when every extension is loaded."""
    if names := list(absent()):
        logger.warning("X-Adapter runs without %s.", " and without ".join(names))
    if untried := difference(running()):
        logger.warning("X-Adapter was not tried with %s; it uses names of theirs that may have changed.", untried)
