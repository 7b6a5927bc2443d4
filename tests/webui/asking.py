"""What the tests ask a WebUI for."""

from __future__ import annotations

from typing import Any

from PIL import Image

from .conftest import PLAIN
from .server import BASE_CHECKPOINT, Answer, WebUIServer

TITLE = "X-Adapter"
BASE, UPGRADED = "LatentDiffusion", "DiffusionEngine"
"""What the probe calls the two models."""
STRENGTH = 0.6
"""Denoising strength where a request does not say it."""
HALF = {"width": PLAIN["width"] // 2, "height": PLAIN["height"] // 2}
USE_BASE = {"override_settings": {"sd_model_checkpoint": BASE_CHECKPOINT}}


def arguments(**given: Any) -> dict[str, Any]:
    """X-Adapter's part of a request, as one REST object."""
    return {"alwayson_scripts": {TITLE: {"args": [given]}}}


def made(answer: Answer) -> Answer:
    """The answer of a request that must have worked."""
    assert answer.status == 200, answer.error
    return answer


def with_xadapter(server: WebUIServer, given: dict[str, Any] | None = None, **request: Any) -> Answer:
    """A request with X-Adapter enabled; `given` are its arguments."""
    return made(server.txt2img(**{**PLAIN, **request}, **arguments(**(given or {}))))


def plain(server: WebUIServer, **request: Any) -> Image.Image:
    """A picture without X-Adapter."""
    return made(server.txt2img(**{**PLAIN, **request})).image


def base_alone(server: WebUIServer, **request: Any) -> Image.Image:
    """What the WebUI's own txt2img gives with the SD1.5 checkpoint selected, at the base's size."""
    return plain(server, **{**HALF, **request}, **USE_BASE)


def sdedit(server: WebUIServer, start: Image.Image, strength: float, **request: Any) -> Image.Image:
    """What the WebUI's own img2img tab gives for a picture, "just resize"."""
    return made(server.img2img(start, **{**PLAIN, **request}, denoising_strength=strength)).image


def over(server: WebUIServer, start: Image.Image, given: dict[str, Any] | None = None, **request: Any) -> Answer:
    """A request of the img2img tab, with X-Adapter's arguments where there are any."""
    asked = {**PLAIN, "denoising_strength": STRENGTH, "do_not_save_grid": True, **request}
    if given is not None:
        others = asked.pop("alwayson_scripts", {})
        asked["alwayson_scripts"] = {**others, **arguments(**given)["alwayson_scripts"]}
    return made(server.img2img(start, **asked))
