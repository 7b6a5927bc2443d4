"""Stage 1 over the control image, as the paper's tile pipeline does it.

The base's picture is the one that the WebUI's own img2img tab makes of that image with the SD1.5 checkpoint selected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tests.pictures import grey_levels_apart

from .asking import HALF, TITLE, USE_BASE, made
from .conftest import PLAIN, is_blank
from .server import Answer, WebUIServer, encode_image

REQUEST = {
    **PLAIN,
    "steps": 4,
    "do_not_save_grid": True,
    # the usual first noise level leaves next to nothing of what a small random VAE makes of an image
    "scheduler": "Karras",
    "override_settings": {"sigma_max": 1},
}
BASE_PICTURE = {"weight": 0, "switch_point": 0.2, "return_base_image": True}
CONTROL_IMAGE = {"base_start": "control image"}
RESIZE_MODES = ("Just Resize", "Crop and Resize", "Resize and Fill")
"""In the img2img tab's numbers."""


def picture(ground: str = "navy") -> Image.Image:
    """In another ratio than what is made, and with an edge at every border."""
    image = Image.new("RGB", (200, 136), ground)
    ImageDraw.Draw(image).ellipse((0, 0, 199, 135), fill="orange")
    return image


def unit(image: Image.Image | None = None, resize_mode: str = "Crop and Resize", **more: Any) -> dict[str, Any]:
    settings = {"enabled": True, "module": "none", "model": "t2iadapter_canny_sd15", "resize_mode": resize_mode}
    return {**settings, "image": encode_image(image or picture()), **more}


@pytest.fixture(scope="module")
def server(models: Path, start_webui) -> Iterator[WebUIServer]:
    if not os.environ.get("CONTROLNET_DIR"):
        pytest.skip("needs the ControlNet extension: set CONTROLNET_DIR to the folder of sd-webui-controlnet")
    extension = Path(os.environ["CONTROLNET_DIR"]).resolve()
    # a setting that config.json lacks is not put back after a request that overrides it
    with start_webui("base-start", more_extensions=[extension], options={"sigma_max": 0}) as started:
        yield started


def ask(server: WebUIServer, units: list[dict], given: dict, **request: Any) -> Answer:
    scripts = {"ControlNet": {"args": units}, TITLE: {"args": [given]}}
    return server.txt2img(**{**REQUEST, **request}, alwayson_scripts=scripts)


def of_the_base(answer: Answer) -> list[Image.Image]:
    """The base's pictures, without the detected maps after them."""
    small = [image for image in made(answer).images if image.size == (HALF["width"], HALF["height"])]
    return small[: answer.info["batch_size"]]


def base_picture(server: WebUIServer, units: list[dict], given: dict, **request: Any) -> Image.Image:
    return of_the_base(ask(server, units, {**BASE_PICTURE, **given}, **request))[0]


def img2img(server: WebUIServer, start: Image.Image, units: list[dict], **request: Any) -> Image.Image:
    """The tab's picture with the SD1.5 checkpoint; at a denoising strength of 1 every step is taken."""
    request = {**REQUEST, **HALF, "denoising_strength": 1, **request}
    request["override_settings"] = {**REQUEST["override_settings"], **USE_BASE["override_settings"]}
    answer = server.img2img(start, **request, alwayson_scripts={"ControlNet": {"args": units}})
    return made(answer).images[0]


@pytest.mark.parametrize(
    ("resize_mode", "sampler"),
    [*((mode, "Euler") for mode in RESIZE_MODES), ("Crop and Resize", "DDIM"), ("Crop and Resize", "DPM++ 2M")],
)
def test_the_bases_picture_is_the_img2img_tabs(server, resize_mode, sampler):
    units, request = [unit(resize_mode=resize_mode)], {"sampler_name": sampler}
    over_it = base_picture(server, units, CONTROL_IMAGE, **request)
    tab = img2img(server, picture(), units, resize_mode=RESIZE_MODES.index(resize_mode), **request)
    assert not is_blank(over_it)
    assert grey_levels_apart(over_it, tab) <= 1
    assert grey_levels_apart(over_it, base_picture(server, units, {"base_start": "noise"}, **request)) > 1


def test_the_first_unit_gives_the_image(server):
    units = [unit(picture("white"), "Just Resize", weight=0.5), unit(picture("black"))]
    over_it = base_picture(server, units, CONTROL_IMAGE)
    assert grey_levels_apart(over_it, img2img(server, picture("white"), units, resize_mode=0)) <= 1
    assert grey_levels_apart(over_it, base_picture(server, units[::-1], CONTROL_IMAGE)) > 1


def test_a_picture_in_a_batch_is_the_one_made_alone(server):
    batch = of_the_base(ask(server, [unit()], {**BASE_PICTURE, **CONTROL_IMAGE}, batch_size=2))
    for place, together in enumerate(batch):
        alone = base_picture(server, [unit()], CONTROL_IMAGE, seed=PLAIN["seed"] + place)
        assert grey_levels_apart(together, alone) <= 1
    assert grey_levels_apart(*batch) > 1


def test_it_reaches_sdxls_picture_and_the_infotext(server):
    over_it, from_noise = (made(ask(server, [unit()], given)) for given in (CONTROL_IMAGE, {}))
    assert grey_levels_apart(over_it.images[0], from_noise.images[0]) > 1
    assert "X-Adapter base start: control image" in over_it.infotexts[0]
    assert "X-Adapter base start" not in from_noise.infotexts[0]


@pytest.mark.parametrize(
    ("units", "given", "sentence"),
    [
        ([], {}, "no enabled ControlNet unit of the base has an image"),
        ([unit(enabled=False)], {}, "no enabled ControlNet unit of the base has an image"),
        ([unit()], {"single_stage": True}, "'base_start' is 'control image', but a single stage starts from noise"),
    ],
)
def test_without_an_image_or_a_stage_1_it_is_refused(server, units, given, sentence):
    answer = ask(server, units, {**CONTROL_IMAGE, **given})
    assert answer.status == 422
    assert sentence in answer.error


def test_a_base_recorded_before_sdxl_starts_from_the_image_of_its_own_job(server):
    """A recording is found again for the same start alone."""

    def pictures(image: Image.Image, memory: str, start: str = "control image") -> tuple[Image.Image, ...]:
        given = {"base_start": start, "memory": memory, "return_base_image": True}
        return made(ask(server, [unit(image)], given)).images[:2]

    black, white = picture("black"), picture("white")
    for case in ((black, "control image"), (white, "control image"), (white, "noise")):
        of_case = {memory: pictures(case[0], memory, case[1]) for memory in ("recorded", "lockstep")}
        for recorded, together in zip(*of_case.values(), strict=True):
            assert grey_levels_apart(recorded, together) <= 1
    assert grey_levels_apart(pictures(black, "recorded")[1], pictures(white, "recorded")[1]) > 1
