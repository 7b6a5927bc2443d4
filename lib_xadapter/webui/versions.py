"""The versions of the WebUI and the ControlNet extension that run here, and those that X-Adapter was tried with."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

from modules import launch_utils

from ..tried_versions import Version, difference

logger = logging.getLogger(__name__)

TRIED_WEBUI = "v1.10.1"
TRIED_CONTROLNET = "v1.1.455"


def running() -> Iterator[Version]:
    """The WebUI's, and the ControlNet extension's where it is there."""
    yield Version("the WebUI", TRIED_WEBUI, launch_utils.git_tag())
    if controlnet := sys.modules.get("scripts.controlnet_version"):
        yield Version("sd-webui-controlnet", TRIED_CONTROLNET, controlnet.version_flag)


def warn_of_others() -> None:
    """One line in the log where another version runs than was tried; called when every extension is loaded."""
    if told := difference(running()):
        logger.warning("X-Adapter was not tried with %s; it uses names of theirs that may have changed.", told)
