"""Units of the ControlNet extension for the tests, what they are asked with, and which pictures are whose."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from tests.pictures import grey_levels_apart

from .asking import TITLE, made
from .conftest import PLAIN
from .server import Answer, WebUIServer, encode_image

CONTROLNET = "control_v11p_sd15_canny"
T2I_ADAPTER = "t2iadapter_canny_sd15"
# what no name tells: the extension takes neither for SD1.5, and its files are read
T2I_WITHOUT_NAME = "lines"
T2I_OF_SDXL = "linesxl"

REQUEST = {**PLAIN, "steps": 4, "prompt": "a cat"}
SMALL = {"base_checkpoint": "tiny15", "adapter": "tiny"}
WIDE = {"base_checkpoint": "wide15", "adapter": "wide"}
STAGE_ONE = {"weight": 0, "switch_point": 0.2, "return_base_image": True}
"""Little more than the base's own picture."""

Case = tuple[list[dict[str, Any]], dict[str, Any]]
"""Units, and what else the request says."""


def extension() -> Path:
    """The ControlNet extension on this machine; the test is skipped where there is none."""
    if not os.environ.get("CONTROLNET_DIR"):
        pytest.skip("needs the ControlNet extension: set CONTROLNET_DIR to the folder of sd-webui-controlnet")
    return Path(os.environ["CONTROLNET_DIR"]).resolve()


# --- units ------------------------------------------------------------------------------------------------------------


def picture(width: int = 200, height: int = 136, background: str = "navy") -> Image.Image:
    """Something with edges, in another ratio than what is made."""
    image = Image.new("RGB", (width, height), background)
    drawing = ImageDraw.Draw(image)
    drawing.rectangle((20, 20, 90, 110), fill="orange")
    drawing.ellipse((100, 30, 180, 110), fill="white")
    return image


def mask(width: int = 200, height: int = 136) -> Image.Image:
    image = Image.new("RGB", (width, height), "black")
    ImageDraw.Draw(image).rectangle((60, 0, 140, height), fill="white")
    return image


def unit(model: str | None, module: str = "canny", **given: Any) -> dict[str, Any]:
    """A unit as the ControlNet extension takes it over REST."""
    image = {} if "image" in given or "ipadapter_input" in given else {"image": encode_image(picture())}
    return {"enabled": True, "module": module, "model": model or "None", "processor_res": 128, **image, **given}


def embedding(value: Any) -> str:
    """What an annotator would give for an image, as a unit's `ipadapter_input`."""
    file = io.BytesIO()
    torch.save(value, file)
    return base64.b64encode(file.getvalue()).decode()


T2I = unit(T2I_ADAPTER, "none")
LINES = unit(T2I_WITHOUT_NAME, "none")
LINES_XL = unit(T2I_OF_SDXL, "none")
REFERENCE = unit(None, "reference_only", threshold_a=0.5)
CANNY = unit(CONTROLNET)
FIRMLY = {"control_mode": "ControlNet is more important"}


# --- pictures ---------------------------------------------------------------------------------------------------------


def ask(server: WebUIServer, units: list[dict], given: dict | None = None, **request: Any) -> Answer:
    """Pictures with these units; `given` are X-Adapter's arguments, None for none."""
    scripts: dict[str, Any] = {"ControlNet": {"args": units}} if units else {}
    if given is not None:
        scripts[TITLE] = {"args": [given]}
    return server.txt2img(**{**REQUEST, **request}, alwayson_scripts=scripts)


def half_size(request: Mapping[str, Any]) -> dict[str, int]:
    """The base's size for a request."""
    return {side: request.get(side, PLAIN[side]) // 2 for side in ("width", "height")}


def of_the_base(answer: Answer, **request: Any) -> list[Image.Image]:
    """Pictures of the base's size: its own, then the detected maps."""
    return [image for image in made(answer).images if image.size == tuple(half_size(request).values())]


def of_sdxl(answer: Answer) -> list[Image.Image]:
    """Pictures of SDXL's size, without grids."""
    return [image for image in made(answer).images if image.size == (answer.info["width"], answer.info["height"])]


def final(server: WebUIServer, units: list[dict], given: dict | None, **request: Any) -> Image.Image:
    """SDXL's picture."""
    return of_sdxl(ask(server, units, given, **request))[0]


def natively(server: WebUIServer, checkpoint: str, cases: Mapping[str, Case]) -> dict[str, list[Image.Image]]:
    """What the WebUI and the extension make of each case with the SD1.5 checkpoint selected, at the base's size."""
    server.post("/sdapi/v1/options", {"sd_model_checkpoint": checkpoint})
    try:
        made_natively = {}
        for name, (units, request) in cases.items():
            smaller = {**request, **half_size(request)}
            made_natively[name] = of_the_base(ask(server, units, **smaller), **request)
            without = f"without units: {request}"
            if without not in made_natively:
                made_natively[without] = of_the_base(ask(server, [], **smaller), **request)
        return made_natively
    finally:
        server.post("/sdapi/v1/options", {"sd_model_checkpoint": "tinyxl"})


def check_base_picture(
    server: WebUIServer, native: Mapping[str, list[Image.Image]], name: str, case: Case, given: dict
) -> None:
    """The base's picture and the detected maps are the ones made natively, and the units change the picture."""
    units, request = case
    ours = of_the_base(ask(server, units, {**given, **STAGE_ONE}, **request), **request)
    images = request.get("batch_size", 1)
    assert len(ours) == len(native[name]) == images + sum(map(maps_of, units))
    assert all(len(image.getcolors(2**16)) > 99 for image in ours[:images]), "a blank picture"
    for one, other in zip(ours, native[name], strict=True):
        assert grey_levels_apart(one.convert("RGB"), other.convert("RGB")) <= 1
    if units:
        assert grey_levels_apart(ours[0], native[f"without units: {request}"][0]) > 1


def maps_of(unit: dict[str, Any]) -> int:
    """How many detected maps the extension shows for a unit."""
    if "ipadapter_input" in unit:
        return 0
    return len(unit["image"]) if isinstance(unit["image"], list) else 1
