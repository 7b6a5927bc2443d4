"""What the ✨ button is told by the picture that it was pressed for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modules import images
from modules.infotext_utils import parse_generation_parameters
from modules.processing import StableDiffusionProcessing

from ..infotext import read_infotext


def arguments_of_finished_picture(p: StableDiffusionProcessing) -> Mapping[str, Any]:
    """Arguments that the infotext of a finished picture holds; nothing for any other job.

    The WebUI upscales it with the page's settings of that moment. A picture that was made without X-Adapter is not
    enlarged with it, and one that was made with it is, whatever is ticked by then.
    """
    if not getattr(p, "txt2img_upscale", False):
        return {}
    infotext, _ = images.read_info_from_image(p.firstpass_image)
    if not infotext:
        return {}
    return read_infotext(parse_generation_parameters(infotext, [])) or {"enabled": False}
